/** The server, as the page speaks to it. */

/** The answer's JSON. Throws an Error whose `param` is the field that is at fault, if it is one. */
export async function call(method, path, body) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  const response = await fetch(path, { method, headers, body: JSON.stringify(body) });
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const error = answer.error ?? { message: `${response.status} ${response.statusText}` };
  throw Object.assign(new Error(error.message), { param: error.param, status: response.status });
}

/** The running picture so far, as an object URL; null if there is none. */
export async function previewOf(id, number) {
  const response = await fetch(`/api/jobs/${id}/preview?number=${number}`);
  return response.status === 200 ? URL.createObjectURL(await response.blob()) : null;
}

/** A picture that was sent before, as a file. Throws if it is no longer there. */
export async function given(sha256) {
  const response = await fetch(`/api/given/${sha256}`);
  if (!response.ok) throw new Error(response.statusText);
  const blob = await response.blob();
  return new File([blob], sha256.slice(0, 10), { type: blob.type });
}

/** Hears of all jobs until the page closes. opened: at each connection, also after the server was away. */
export function listen(since, heard, opened, lost) {
  const source = new EventSource(`/api/events?since=${since}`);
  source.addEventListener("job", (event) => heard(JSON.parse(event.data)));
  source.addEventListener("open", opened);
  source.addEventListener("error", () => {
    lost();
    if (source.readyState === EventSource.CLOSED) setTimeout(() => listen(0, heard, opened, lost), 5000);
  });
}
