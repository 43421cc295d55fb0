// Server-sent events that come back: a browser tries again by itself when a connection breaks, but not after an answer that is no stream.

const AGAIN = 3000;

export function stream(url, name, take, { opened, away }) {
  const source = new EventSource(url);
  source.addEventListener("open", opened);
  source.addEventListener(name, (event) => take(JSON.parse(event.data)));
  source.addEventListener("error", async () => {
    away("");
    if (source.readyState !== EventSource.CLOSED) return;
    const why = await reason(url);
    away(why);
    if (!why) setTimeout(() => stream(url, name, take, { opened, away }), AGAIN);
  });
}

// Why there is no stream, in the server's words: a filter that breaks a rule. Empty where another attempt may do better. Without a
// session the page goes to sign in.
async function reason(url) {
  const stop = new AbortController();
  try {
    const answer = await fetch(url, { signal: stop.signal, headers: { Accept: "text/event-stream" } });
    if (answer.status === 401) location.reload();
    if (answer.ok || answer.status === 401 || answer.status === 429 || answer.status >= 500) return "";
    return (await answer.json()).detail;
  } catch {
    return "";
  } finally {
    stop.abort();
  }
}
