// The snapshots of the last minutes of one model, and what follows from their differences: rates, shares, percentiles.

export const SPAN = 300; // seconds that are kept
const SHORTEST = 60; // a line is not drawn over less
const RATE_SPAN = 3; // seconds over which "now" is taken
const SHARE_SPAN = 60;
const PERCENTILE_SPAN = 10; // of each point of a percentile's line

export class History {
  #samples = []; // {time, model}, times in seconds of the server's clock, ascending

  // A snapshot of the model. One that is older than the last, or has counted less, is of a server that has begun anew.
  add(time, model) {
    const last = this.#samples.at(-1);
    if (last && (time <= last.time || model.counters.steps < last.model.counters.steps)) this.#samples = [];
    this.#samples.push({ time, model });
    while (this.#samples[0].time < time - SPAN) this.#samples.shift();
  }

  // Seconds that lines are drawn over: as many as there are, within bounds.
  get span() {
    const [first, last] = [this.#samples[0], this.#samples.at(-1)];
    return first ? Math.min(SPAN, Math.max(SHORTEST, last.time - first.time)) : SHORTEST;
  }

  // [[seconds ago, value]] of what `read` says of each sample; a null is a gap.
  line(read) {
    const now = this.#samples.at(-1)?.time ?? 0;
    return this.#samples.map((sample, index) => [now - sample.time, read(sample.model, index)]);
  }

  // Of a counter: by how much it went up each second, lately.
  rate(counter) {
    return this.#rateAt(this.#samples.length - 1, counter, RATE_SPAN);
  }

  rateLine(counter) {
    return this.line((_, index) => this.#rateAt(index, counter, 1));
  }

  // Of what one counter counts, the part that another does; null where it has counted nothing.
  share(part, whole) {
    return this.#shareAt(this.#samples.length - 1, part, whole);
  }

  shareLine(part, whole) {
    return this.line((_, index) => this.#shareAt(index, part, whole));
  }

  // By how much something that only goes up went up in the time that is kept.
  gained(read) {
    return this.#samples.length ? read(this.#samples.at(-1).model) - read(this.#samples[0].model) : 0;
  }

  // Percentiles (0 to 1 each) of a histogram over the last `seconds`; 0: over all that it has counted.
  percentiles(name, shares, seconds) {
    const last = this.#samples.length - 1;
    const counts = this.#counted(last, name, seconds === 0 ? null : seconds);
    const bounds = this.#samples[last]?.model.histograms[name]?.bounds;
    return shares.map((share) => (counts && bounds ? percentile(bounds, counts, share) : null));
  }

  percentileLine(name, share) {
    return this.line((model, index) => {
      const counts = index && this.#counted(index, name, PERCENTILE_SPAN);
      return counts ? percentile(model.histograms[name].bounds, counts, share) : null;
    });
  }

  #rateAt(index, counter, span) {
    const from = this.#before(index, span);
    if (from === null) return null;
    const [begin, end] = [this.#samples[from], this.#samples[index]];
    return (end.model.counters[counter] - begin.model.counters[counter]) / (end.time - begin.time);
  }

  #shareAt(index, part, whole) {
    const from = this.#before(index, SHARE_SPAN);
    if (from === null) return null;
    const [before, after] = [this.#samples[from].model.counters, this.#samples[index].model.counters];
    const all = after[whole] - before[whole];
    return all > 0 ? (after[part] - before[part]) / all : null;
  }

  // What a histogram counted in the seconds before a sample; null for `seconds`: ever.
  #counted(index, name, seconds) {
    const after = this.#samples[index]?.model.histograms[name]?.counts;
    if (!after || seconds === null) return after ?? null;
    const from = this.#before(index, seconds);
    if (from === null) return null;
    const before = this.#samples[from].model.histograms[name].counts;
    return after.map((count, bucket) => count - before[bucket]);
  }

  // The sample so many seconds before another, or the first one there is; null where there is none before it.
  #before(index, seconds) {
    let from = index;
    while (from > 0 && this.#samples[from].time > this.#samples[index].time - seconds) from -= 1;
    return from < index ? from : null;
  }
}

// Of values that are counted in buckets (upper bounds; the last count is of what is above all), linear within a bucket;
// null where there are none. What is above all bounds counts as the last one.
export function percentile(bounds, counts, share) {
  const all = counts.reduce((sum, count) => sum + count, 0);
  if (!all) return null;
  let left = share * all;
  for (const [bucket, count] of counts.entries()) {
    if (count && left <= count) {
      const low = bucket ? bounds[bucket - 1] : 0;
      const high = bounds[bucket] ?? low;
      return low + (high - low) * (left / count);
    }
    left -= count;
  }
  return bounds.at(-1);
}
