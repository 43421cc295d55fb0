// A device with npm's package mqtt: one JSON command a line on standard input, one JSON event a line on standard output.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import mqtt from "mqtt";

const tell = (event, more = {}) => console.log(JSON.stringify({ event, ...more }));
let client;

const commands = {
  connect({ url, ca, ...options }) {
    client = mqtt.connect(url, { ...options, ca: ca && readFileSync(ca), reconnectPeriod: 0, connectTimeout: 8000 });
    client.on("connect", ({ sessionPresent }) => tell("connect", { sessionPresent }));
    client.on("message", (topic, payload, { qos, retain, dup }) =>
      tell("message", { topic, payload: payload.toString("base64"), qos, retain, dup }));
    client.on("error", ({ message, code }) => tell("error", { message, code }));
    client.on("close", () => tell("close"));
  },
  subscribe({ filter, qos }) {
    client.subscribe(filter, { qos }, (error, granted) =>
      tell("subscribed", { granted: error ? error.packet.granted : granted.map((each) => each.qos) }));
  },
  publish({ topic, payload, qos }) {
    client.publish(topic, payload, { qos }, (error) => tell("published", { error: error?.message }));
  },
  disconnect() {
    client.end();
  },
};

createInterface({ input: process.stdin }).on("line", (line) => {
  const { command, ...rest } = JSON.parse(line);
  commands[command](rest);
});
