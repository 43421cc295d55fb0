// Receives webhooks of uplinkd in the forms structured and batch: verifies each request, and prints each message once.
//   npm install standardwebhooks
//   WEBHOOK_SECRET=whsec_… node webhook_receiver.mjs 9000
import { createServer } from "node:http";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

const webhook = new Webhook(process.env.WEBHOOK_SECRET);
const seen = new Set(); // in earnest: a unique key in your database, written together with what the message does there

function handle(event) {
  if (seen.has(event.id)) return;
  const data = "data_base64" in event ? Buffer.from(event.data_base64, "base64") : JSON.stringify(event.data);
  console.log(event.id, event.subject, data.toString());
  seen.add(event.id);
  if (seen.size > 100_000) seen.delete(seen.values().next().value);
}

createServer(async (request, response) => {
  const parts = [];
  for await (const part of request) parts.push(part);
  try {
    const document = webhook.verify(Buffer.concat(parts).toString(), request.headers);
    [document].flat().forEach(handle);
    response.writeHead(204).end();
  } catch (error) {
    // 401: it comes again, when the secret or the clock is right. 500: it comes again, too.
    response.writeHead(error instanceof WebhookVerificationError ? 401 : 500).end(error.message);
  }
}).listen(Number(process.argv[2]), "127.0.0.1");
