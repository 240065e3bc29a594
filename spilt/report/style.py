"""The page's own style and script, inlined; nothing is loaded from anywhere."""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #f6f5f1; --card: #fffffe; --ink: #1b1d21; --muted: #565c65; --line: #dedcd5; --accent: #0a4c86; --soft: #eef2f6;
  --warn: #8a4b08; --warn-soft: #fbf1e3;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Noto Sans", "DejaVu Sans", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", "Source Serif 4", "Noto Serif", Georgia, serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #121417; --card: #1a1d21; --ink: #eceae5; --muted: #a7acb4; --line: #31363d; --accent: #7cbbf7; --soft: #222b35;
    --warn: #f2b36b; --warn-soft: #2b2319;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.6 var(--sans); }
main, header, footer { max-width: 74rem; margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2.5rem); }
header { padding-top: clamp(2rem, 6vw, 4.5rem); }
h1, h2, h3 { font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.8rem, 1.2rem + 2.6vw, 3rem); letter-spacing: -.01em; margin: .25rem 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: clamp(1.35rem, 1.1rem + 1vw, 1.8rem); margin: 0 0 .5rem; }
h3 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
p, li { max-width: 46rem; }
a { color: var(--accent); text-underline-offset: .18em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
.over { color: var(--muted); font-size: .8rem; letter-spacing: .09em; text-transform: uppercase; margin: 0; }
.lede { font-size: 1.1rem; color: var(--muted); margin: 0; }
nav { margin: 1.5rem 0 0; font-size: .92rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.25rem; margin: 0; padding: 0; }
section { margin: clamp(2.5rem, 5vw, 4rem) 0; scroll-margin-top: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin: 1.25rem 0; padding: 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.25rem; }
.tile dt { color: var(--muted); font-size: .87rem; }
.tile dd, .tile .said { margin: 0; }
.tile .figure { font: 600 1.4rem/1.25 var(--serif); margin: .15rem 0 .5rem; overflow-wrap: anywhere; }
.tile .said { font-size: .95rem; line-height: 1.55; }
.tile.wide { grid-column: 1 / -1; }
.tile.warning { border-color: var(--warn); background: var(--warn-soft); }
.tile.warning .figure { color: var(--warn); }
.note { background: var(--warn-soft); border-left: 3px solid var(--warn); border-radius: 0 .4rem .4rem 0; padding: .75rem 1.1rem;
  margin: 1rem 0; }
.note p { margin: 0; } .note ul { margin: .3rem 0 0; padding-left: 1.15rem; } .note li { margin: .15rem 0; }
figure { margin: 1.25rem 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: clamp(.6rem, 2vw, 1.5rem); }
figure img { display: block; width: 100%; height: auto; margin: 0 auto; }
figure.small img { max-width: 45rem; margin: 0; }
figcaption { color: var(--muted); font-size: .9rem; max-width: 52rem; margin: .9rem 0 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: 1.25rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; padding: .9rem 1rem .6rem; color: var(--muted); font-size: .9rem; line-height: 1.5; }
caption span { display: block; position: sticky; left: 1rem; width: min(50rem, calc(100vw - 5rem)); }
th, td { padding: .42rem .7rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { vertical-align: bottom; padding: 0; font-weight: 600; }
tbody th { font-weight: 600; white-space: nowrap; position: sticky; left: 0; background: var(--card); }
tbody th.claim { font-weight: 400; white-space: normal; position: static; min-width: 14rem; }
tbody tr:hover th { background: var(--soft); }
@media (max-width: 640px) { tbody th { white-space: normal; max-width: 7rem; } }
td.n, thead th.n { text-align: right; } td.n { white-space: nowrap; }
tbody tr:hover { background: var(--soft); }
td small { display: block; color: var(--muted); font-size: .8em; }
td.text { min-width: 14rem; } td.nobr { white-space: nowrap; }
thead button { all: unset; box-sizing: border-box; display: block; width: 100%; padding: .5rem .7rem; cursor: pointer; line-height: 1.3; }
thead button:hover { color: var(--accent); }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
thead button small { display: block; min-width: 4.2rem; font-weight: 400; color: var(--muted); }
thead button span::after { content: "\\00a0\\2195"; color: var(--muted); opacity: .55; font-weight: 400; }
th[aria-sort="ascending"] button span::after { content: "\\00a0\\2191"; color: var(--accent); opacity: 1; }
th[aria-sort="descending"] button span::after { content: "\\00a0\\2193"; color: var(--accent); opacity: 1; }
details { border-top: 1px solid var(--line); } details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .7rem .2rem; font-weight: 600; } summary:hover { color: var(--accent); }
summary small { font-weight: 400; color: var(--muted); margin-left: .5rem; }
.prompt { margin: 1rem 0 .5rem; padding-left: .9rem; border-left: 3px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; }
.strip { display: flex; gap: .75rem; overflow-x: auto; padding: .25rem .25rem 1rem; margin: 0; list-style: none; }
.strip li { flex: 0 0 min(17rem, 78vw); background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem .9rem; }
.strip li.best { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
.strip .m { font-weight: 600; font-variant-numeric: tabular-nums; } .strip .m small { font-weight: 400; color: var(--accent);
  margin-left: .4rem; }
.strip .answer { margin: .35rem 0 0; font-size: .9rem; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 16rem; overflow-y: auto; }
.prompt + .quiet { margin: .25rem 0 .5rem; font-size: .9rem; }
.note details { border: 0; } .note summary { padding: .3rem 0; font-weight: 400; }
.quiet { color: var(--muted); } code { font-size: .9em; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: .87rem; padding-bottom: 3rem; } footer p { margin: .4rem 0; }
@media print { body { background: #fff; } nav, thead button span::after { display: none; } figure, .tile { break-inside: avoid; } }
"""

JS = """
// Sort a table by a column: numbers by data-v, text as it reads; rows without a value stay last.
for (const button of document.querySelectorAll('thead button')) {
  button.addEventListener('click', () => {
    const head = button.closest('th'), table = head.closest('table'), body = table.tBodies[0];
    const at = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute('aria-sort') === 'ascending';
    for (const other of head.parentNode.children) other.setAttribute('aria-sort', 'none');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const key = (row) => row.children[at].dataset.v ?? row.children[at].textContent.trim();
    const numeric = head.classList.contains('n');
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === '' || b === '') return (a === '') - (b === '');
      const order = numeric ? Number(a) - Number(b) : a.localeCompare(b);
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  });
}
"""
