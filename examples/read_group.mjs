// Prints what a consumer group gets, as it arrives.
//   npm install rhea
//   NODE_EXTRA_CA_CERTS=data/tls/ca.pem node read_group.mjs localhost:5671 APP_KEY APP_SECRET GROUP
// NODE_EXTRA_CA_CERTS is only needed with the certificate that uplinkd makes for itself.
import crypto from "node:crypto";
import rhea from "rhea";

const [server, key, secret, group] = process.argv.slice(2);
const [host, port] = server.split(":");
const timestamp = Date.now();
const content = `authId=${key}&timestamp=${timestamp}`;

const connection = rhea.connect({
  host,
  port: Number(port),
  servername: host,
  transport: "tls",
  idle_time_out: 60000,
  username: `reader-1|authMode=aksign,signMethod=hmacsha256,timestamp=${timestamp},authId=${key},consumerGroupId=${group}|`,
  password: crypto.createHmac("sha256", secret).update(content).digest("base64"),
});
connection.open_receiver({ autoaccept: false, credit_window: 100 });

rhea.on("message", ({ message, delivery }) => {
  console.log(message.application_properties.topic, message.body.content.toString());
  delivery.accept(); // or delivery.release(): then it comes again
});
rhea.on("connection_close", ({ connection }) => console.error(String(connection.error ?? "closed")));
rhea.on("connection_error", ({ error }) => console.error(String(error)));
