// Server-sent events by fetch: unlike EventSource, it can send a token.

const TOKEN = "trunkline-token";
// The sidecar says something every five seconds; who hears nothing for so long begins anew.
const SILENCE_MS = 16000;

export function setToken(token) {
  if (token) sessionStorage.setItem(TOKEN, token);
  else sessionStorage.removeItem(TOKEN);
}

export function authorized(headers = {}) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
}

/** What an answer says went wrong; `fallback` where it does not. */
export async function reasonOf(response, fallback) {
  try {
    return (await response.json()).error.message;
  } catch {
    return fallback;
  }
}

/** Follows the events for ever. `on` has opened(role), event(name, data), lost(message), and refused(message), which waits for a token. */
export async function follow(url, on) {
  let lastId = "";
  for (let pause = 1000; ; pause = Math.min(2 * pause, 5000)) {
    const silence = new AbortController();
    let timer = setTimeout(() => silence.abort(), SILENCE_MS);
    try {
      const response = await fetch(url, { headers: authorized(lastId ? { "Last-Event-ID": lastId } : {}), cache: "no-store", signal: silence.signal });
      if (response.status === 401 || response.status === 403) {
        clearTimeout(timer);
        await on.refused(await reasonOf(response, "The token does not count."));
        pause = 500;
        continue;
      }
      if (!response.ok) {
        on.lost(await reasonOf(response, `The sidecar answers ${response.status}.`));
        pause = 1000 * Number(response.headers.get("Retry-After") || 2) / 2;
      } else {
        on.opened(response.headers.get("Trunkline-Role"));
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let rest = "";
        for (;;) {
          const { done, value } = await reader.read();
          if (done) break;
          clearTimeout(timer);
          timer = setTimeout(() => silence.abort(), SILENCE_MS);
          const parts = (rest + value).split("\n\n");
          rest = parts.pop();
          for (const part of parts) {
            const event = parsed(part);
            if (event.id) lastId = event.id;
            if (event.data) on.event(event.name, JSON.parse(event.data));
          }
          pause = 1000;
        }
        on.lost("The sidecar ended the connection. Trying again …");
      }
    } catch (error) {
      // A mistake of this page's is not to be taken for one of the network.
      if (!(error instanceof TypeError && /fetch|network/i.test(error.message)) && error.name !== "AbortError") console.error(error);
      on.lost("The sidecar cannot be reached. Trying again …");
    } finally {
      clearTimeout(timer);
    }
    await new Promise((over) => setTimeout(over, pause));
  }
}

function parsed(text) {
  const event = { name: "message", id: "", data: "" };
  for (const line of text.split("\n")) {
    const [, field, value] = /^(\w*): ?(.*)$/.exec(line) ?? [];
    if (field === "event") event.name = value;
    else if (field === "id") event.id = value;
    else if (field === "data") event.data += value;
  }
  return event;
}
