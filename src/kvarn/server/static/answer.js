// One answer of the server, as it comes, and the figures of how it came.
import { ask, events } from "./api.js";

// Gathers one answer. What has come stays here when it is stopped or breaks off.
export class Answer {
  text = "";
  thinking = "";
  finish = null; // as the server says it: "stop", "length", …; null where it did not come to that
  #started = 0;
  #first = null;
  #last = 0;
  #usage = null;

  // Runs to the end; `told()` is called whenever there is more text. Raises Failure, and AbortError where `signal` says so.
  async run(body, signal, told) {
    this.#started = performance.now();
    const request = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await ask("v1/chat/completions", { body: request, signal });
    for await (const event of events(response)) {
      this.#usage = event.usage ?? this.#usage;
      const choice = event.choices[0];
      if (!choice) continue;
      this.finish = choice.finish_reason ?? this.finish;
      if (this.#take(choice.delta)) told();
    }
  }

  #take(delta) {
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    const piece = delta.content ?? "";
    if (!thought && !piece) return false;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.thinking += thought;
    this.text += piece;
    return true;
  }

  // ttft: milliseconds to the first text. rate: tokens a second after it. The counts are the server's. What is not known
  // is left out: of an answer that was stopped the server says no counts.
  get figures() {
    if (this.#first === null) return {};
    const figures = { ttft: Math.round(this.#first - this.#started) };
    const usage = this.#usage;
    if (!usage) return figures;
    const seconds = (this.#last - this.#first) / 1000;
    const rate = usage.completion_tokens > 1 && seconds > 0 ? (usage.completion_tokens - 1) / seconds : undefined;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    return { ...figures, rate, prompt: usage.prompt_tokens, completion: usage.completion_tokens, cached };
  }
}

// The figures in words, for a line below the answer.
export function inWords({ ttft, rate, prompt, completion, cached }) {
  const parts = [];
  if (ttft !== undefined) parts.push(`first token ${ttft < 10_000 ? `${ttft} ms` : `${(ttft / 1000).toFixed(1)} s`}`);
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (completion !== undefined) parts.push(`${completion} tokens`);
  if (prompt !== undefined) parts.push(`prompt ${prompt}${cached ? ` (${cached} cached)` : ""}`);
  return parts.join(" · ");
}
