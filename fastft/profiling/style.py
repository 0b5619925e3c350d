"""The look of `report.html`: one style sheet for light and dark, without fonts or scripts."""

CSS = """\
:root {
  color-scheme: light dark;
  --line: color-mix(in srgb, CanvasText 18%, Canvas);
  --soft: color-mix(in srgb, CanvasText 5%, Canvas);
  --dim: color-mix(in srgb, CanvasText 68%, Canvas);
}
* { box-sizing: border-box; }
body {
  font: 15px/1.5 system-ui, sans-serif; background: Canvas; color: CanvasText;
  max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem;
}
h1 { font-size: 1.5rem; margin: 0; }
h2 {
  font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line);
}
p { margin: .4rem 0; }
.dim { color: var(--dim); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0 0;
}
.tile {
  background: var(--soft); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem;
}
.tile b { display: block; font-size: 1.4rem; line-height: 1.3; font-weight: 650; }
.tile span { display: block; font-size: .84rem; color: var(--dim); }
ul.advice { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
ul.advice li {
  border-left: 4px solid #c2511b; background: var(--soft); padding: .5rem .8rem;
  border-radius: 0 .4rem .4rem 0;
}
code { font: .88em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.row {
  display: grid; grid-template-columns: 3rem 1fr; gap: .7rem; align-items: center;
  margin: .45rem 0;
}
.row > span { text-align: right; font-size: .9rem; }
.bar {
  display: flex; height: 1.9rem; border-radius: .3rem; overflow: hidden; background: var(--soft);
}
.bar i {
  font-style: normal; font-size: .78rem; line-height: 1.9rem; color: #fff; text-align: center;
  white-space: nowrap; overflow: hidden; box-shadow: inset -1px 0 Canvas;
}
.idle { background: repeating-linear-gradient(135deg, #6c6c6c 0 5px, #7c7c7c 5px 10px) !important; }
.swatch {
  display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem;
  margin-right: .5rem; vertical-align: -.08rem;
}
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .7rem 0; }
th, td {
  text-align: right; padding: .28rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; vertical-align: top;
}
th { font-weight: 600; color: var(--dim); }
th.text, td.text { text-align: left; }
td.long { white-space: normal; min-width: 18rem; }
td.long code {
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
}
tr:last-child td { border-bottom: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: CanvasText; }
svg .axis { stroke: var(--line); }
ul.notes { padding-left: 1.1rem; margin: .4rem 0; color: var(--dim); }
"""
