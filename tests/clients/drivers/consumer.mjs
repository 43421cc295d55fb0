// A consumer with npm's package rhea: one JSON command a line on standard input, one JSON event a line on standard output.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import rhea from "rhea";

const tell = (event, more = {}) => console.log(JSON.stringify({ event, ...more }));
const deliveries = [];
let connection, receiver;

const described = (error) => ({ condition: error?.condition, description: error?.description ?? error?.message });

rhea.on("message", ({ message, delivery }) => {
  deliveries.push(delivery);
  tell("message", {
    payload: message.body.content.toString("base64"), id: message.message_id, properties: message.application_properties,
    topic: message.application_properties.topic, count: message.delivery_count ?? 0,
  });
});
rhea.on("receiver_open", ({ receiver }) => tell("link", { name: receiver.name }));
rhea.on("receiver_error", ({ receiver }) => tell("link_error", { ...described(receiver.error), name: receiver.name }));
rhea.on("sender_error", ({ sender }) => tell("link_error", described(sender.error)));
rhea.on("connection_open", () => tell("connect"));
rhea.on("connection_error", ({ connection, error }) => tell("error", described(connection.error ?? error)));
rhea.on("connection_close", () => tell("close"));
rhea.on("disconnected", ({ error }) => tell("disconnected", described(error)));

const commands = {
  connect({ ca, credit, ...options }) {
    connection = rhea.connect({ host: "localhost", servername: "localhost", transport: "tls", reconnect: false, ca: readFileSync(ca), ...options });
    receiver = connection.open_receiver({ autoaccept: false, credit_window: 0 });
    if (credit) receiver.add_credit(credit);
  },
  credit({ count }) {
    receiver.add_credit(count);
  },
  settle({ outcome }) {
    deliveries.shift()[outcome]();
  },
  second() {
    connection.open_receiver({ name: "second" });
  },
  sender() {
    connection.open_sender("up");
  },
};

createInterface({ input: process.stdin }).on("line", (line) => {
  const { command, ...rest } = JSON.parse(line);
  commands[command](rest);
});
