// Prints what the devices of a product report, and who comes and goes, as it arrives.
//   npm install mqtt
//   NODE_EXTRA_CA_CERTS=data/tls/ca.pem node read_uplink.mjs mqtts://localhost:8883 APP_KEY APP_SECRET PRODUCT_KEY
// `uplinkd app create NAME --product PRODUCT_KEY` gives key and secret. In a page: wss://localhost:8443/mqtt.
import mqtt from "mqtt";

const [url, username, password, product] = process.argv.slice(2);
const client = mqtt.connect(url, { username, password, clientId: `${username}-reader`, clean: false });
const topics = [`/${product}/#`, `/sys/${product}/#`, `/as/mqtt/status/${product}/+`];

function fail(error) {
  console.error(error.message);
  process.exit(1);
}

client.on("connect", () => client.subscribe(topics, { qos: 1 }, (error) => error && fail(error)));
client.on("message", (topic, payload) => console.log(topic, payload.toString()));
client.on("error", fail);
