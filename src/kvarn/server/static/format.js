// Numbers in words. A value that is not known is a dash.

const NONE = "–";
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  return value === null ? NONE : grouped.format(value);
}

// A rate: whole numbers, one digit after the point where that says more.
export function whole(value) {
  if (value === null) return NONE;
  return value > 0 && value < 9.95 && !Number.isInteger(value) ? value.toFixed(1) : grouped.format(value);
}

// A share of 0 to 1.
export function percent(value) {
  if (value === null) return NONE;
  const hundred = 100 * value;
  return `${hundred > 0 && hundred < 9.95 ? hundred.toFixed(1) : hundred.toFixed(0)} %`;
}

// Some seconds, in milliseconds where they are few.
export function seconds(value) {
  if (value === null) return NONE;
  if (value < 0.01) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 1) return `${(1000 * value).toFixed(0)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

// A long time, in its two largest units.
export function duration(total) {
  const parts = [
    [Math.floor(total / 86400), "d"],
    [Math.floor(total / 3600) % 24, "h"],
    [Math.floor(total / 60) % 60, "min"],
    [Math.floor(total) % 60, "s"],
  ];
  const first = Math.max(0, parts.findIndex(([value]) => value > 0));
  const shown = parts.slice(total < 1 ? 3 : first, first + 2);
  return shown.map(([value, unit]) => `${value} ${unit}`).join(" ");
}
