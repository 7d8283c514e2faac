"use strict";
// What a report can do with a script: values at the pointer and by keyboard, tables sorted by their heads, all runs or
// none chosen at once, a dial that follows the pointer. Everything is readable without it; nothing is loaded.
(() => {
  const made = (name, kind, text) => {
    const element = document.createElement(name);
    element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const every = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const shown = (element) => element.getClientRects().length > 0;

  const live = made("div", "unseen");
  live.setAttribute("role", "status");
  const tip = made("div", "tip");
  tip.setAttribute("aria-hidden", "true");
  tip.hidden = true;
  document.body.append(live, tip);

  // ---------------------------------------------------------------------------------- values of a drawing
  // A stop is what can be read at one place: {x, y, head, rows: [{colour, name, text, x, y}]}.

  const axis = (text) => {
    const [slope, offset, kind] = (text || "").split(" ");
    return (value) => Number(slope) * (kind === "log" ? Math.log(value) : value) + Number(offset);
  };

  const chartStops = (svg) => {
    const x = axis(svg.dataset.x), y = svg.dataset.y ? axis(svg.dataset.y) : null;
    const stops = new Map();
    for (const line of every("g.values", svg).filter((line) => getComputedStyle(line).display !== "none")) {
      const seen = new Set();
      for (const point of line.dataset.xy.split(" ").filter(Boolean)) {
        const [at, value, low, high] = point.split(",");
        if (seen.has(at)) continue;  // a step: what holds up to here
        seen.add(at);
        if (!stops.has(at)) stops.set(at, { x: x(Number(at)), y: 0, head: `${svg.dataset.label}: ${at}`, rows: [] });
        const between = low === undefined ? "" : ` (${low}–${high})`;
        stops.get(at).rows.push({
          colour: line.dataset.colour, name: line.dataset.name, text: `${value}${svg.dataset.unit}${between}`,
          x: x(Number(at)), y: y ? y(Number(value)) : null,
        });
      }
    }
    return [...stops.values()].sort((a, b) => a.x - b.x);
  };

  const markStops = (svg) =>
    every("[data-said]", svg).filter(shown).map((mark) => {
      const box = mark.getBBox();
      const place = { x: box.x + box.width / 2, y: box.height > 12 ? box.y : box.y + box.height / 2 };
      return { ...place, head: mark.dataset.said, rows: [] };
    });

  const patchStops = (svg) => {
    const [prefix, columns] = svg.dataset.lie.split(" ").map(Number);
    const [clean, attacked] = every("svg.patches", svg.closest(".pair")).map((side) => side.dataset.experts.split(" "));
    return clean.map((was, at) => {
      const place = at - prefix, row = Math.floor(place / columns), column = place % columns;
      const head = place < 0 ? "class token" : `row ${row + 1}, column ${column + 1}`;
      const now = attacked[at];
      const moved = was === now ? `expert ${was}, as before` : `expert ${was} → ${now}`;
      return { x: place < 0 ? 0.5 : column + 0.5, y: place < 0 ? -1 : row + 0.5, head: `${head}: ${moved}`, rows: [] };
    });
  };

  const readable = [
    ["svg[data-x]", chartStops, (stop, point) => Math.abs(stop.x - point.x), () => 1],
    ["svg.patches", patchStops, (stop, point) => Math.hypot(stop.x - point.x, stop.y - point.y),
      (svg) => Number(svg.dataset.lie.split(" ")[1])],
    ["svg[role=img]:not([data-x]):not(.patches)", markStops,
      (stop, point) => Math.hypot(stop.x - point.x, stop.y - point.y), () => 1],
  ];

  const hide = (svg) => {
    tip.hidden = true;
    every(".cursor", svg).forEach((cursor) => cursor.remove());
  };

  const cursor = (svg, stop) => {
    every(".cursor", svg).forEach((old) => old.remove());
    const group = document.createElementNS(svg.namespaceURI, "g");
    group.setAttribute("class", "cursor");
    const add = (name, attributes) => {
      const element = document.createElementNS(svg.namespaceURI, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      group.append(element);
    };
    if (svg.matches(".patches")) {
      add("rect", { x: stop.x - 0.5, y: stop.y - 0.5, width: 1, height: 1 });
    } else if (stop.rows.length) {
      const height = svg.viewBox.baseVal.height;
      add("line", { x1: stop.x, x2: stop.x, y1: 12, y2: height - 40 });
      for (const row of stop.rows.filter((row) => row.y !== null)) {
        add("circle", { cx: row.x, cy: row.y, r: 4.5, class: `f${row.colour}` });
      }
    } else {
      add("circle", { cx: stop.x, cy: stop.y, r: 9 });
    }
    svg.append(group);
  };

  const show = (svg, stop) => {
    cursor(svg, stop);
    tip.replaceChildren(made("b", "", stop.head));
    for (const row of stop.rows) {
      const line = made("div", "row");
      line.append(made("i", `key b${row.colour}`), made("span", "", row.name), made("b", "", row.text));
      tip.append(line);
    }
    tip.hidden = false;
    const place = new DOMPoint(stop.x, stop.rows.length ? 12 : stop.y).matrixTransform(svg.getScreenCTM());
    const width = document.documentElement.clientWidth;
    const left = place.x + 14 + tip.offsetWidth > width ? place.x - 14 - tip.offsetWidth : place.x + 14;
    tip.style.left = `${Math.max(4, Math.min(left, width - tip.offsetWidth - 4)) + scrollX}px`;
    tip.style.top = `${Math.max(4, place.y - (stop.rows.length ? 0 : tip.offsetHeight + 12)) + scrollY}px`;
  };

  const said = (stop) => [stop.head, ...stop.rows.map((row) => `${row.name} ${row.text}`)].join("; ");

  const followed = (svg, stopsOf, distance, wide) => {
    let at = null;
    const nearest = (event) => {
      const stops = stopsOf(svg);
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const far = stops.map((stop) => distance(stop, point));
      at = far.indexOf(Math.min(...far));
      if (at >= 0) show(svg, stops[at]);
    };
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    for (const end of ["pointerleave", "blur"]) svg.addEventListener(end, () => { at = null; hide(svg); });
    svg.addEventListener("keydown", (event) => {
      const stops = stopsOf(svg), last = stops.length - 1, step = wide(svg);
      const from = at === null ? -1 : at;
      const to = {
        ArrowRight: from + 1, ArrowLeft: at === null ? last : from - 1, ArrowDown: from + step, ArrowUp: from - step,
        Home: 0, End: last,
      }[event.key];
      if (event.key === "Escape") hide(svg);
      if (to === undefined || last < 0) return;
      event.preventDefault();
      at = Math.max(0, Math.min(to, last));
      show(svg, stops[at]);
      live.textContent = said(stops[at]);
    });
    svg.tabIndex = 0;
  };

  for (const title of every("figure svg title")) {  // the browser's own tooltips would stand beside ours
    title.parentNode.dataset.said = title.textContent;
    title.remove();
  }
  for (const [selector, stopsOf, distance, wide] of readable) {
    for (const svg of every(selector).filter((svg) => svg.closest("figure"))) followed(svg, stopsOf, distance, wide);
  }

  // ---------------------------------------------------------------------------------- tables

  const UNITS = { s: 1, min: 60, h: 3600 };

  const textOf = (cell) => {
    const copy = cell.cloneNode(true);
    every("small", copy).forEach((small) => small.remove());
    return copy.textContent.trim();
  };

  const numberOf = (text) => {
    const times = [...text.matchAll(/([\d.]+) (h|min|s)\b/g)];
    if (times.length) return times.reduce((sum, [, value, unit]) => sum + value * UNITS[unit], 0);
    const number = /^([+−-]?)([\d,]*\.?\d+(?:e[+-]?\d+)?)(?:\/(\d+))?/.exec(text);
    if (!number) return null;
    const value = Number(number[2].replaceAll(",", "")) / Number(number[3] || 1);
    return number[1] && number[1] !== "+" ? -value : value;
  };

  const EMPTY = ["", "–", "not measured", "no router"];

  const compare = (a, b) => {
    if (a.empty || b.empty) return a.empty - b.empty;
    if (a.number !== null && b.number !== null) return a.number - b.number;
    if (a.number !== null || b.number !== null) return a.number === null ? 1 : -1;
    return a.text.localeCompare(b.text, "en", { numeric: true });
  };

  const sortable = (table) => {
    const heads = every("thead th", table), body = table.tBodies[0];
    const first = [...body.rows];
    if (first.length < 2 || table.tHead.rows.length > 1) return;
    if (first.some((row) => row.cells.length !== heads.length)) return;
    table.classList.add("sortable");
    heads.forEach((head, at) => {
      const name = textOf(head);
      if (!name) return;
      const button = made("button", "sort");
      button.type = "button";
      button.append(...head.childNodes);
      const arrow = made("span", "arrow");
      arrow.setAttribute("aria-hidden", "true");
      button.insertBefore(arrow, button.querySelector("small"));
      head.append(button);
      button.addEventListener("click", () => {
        const keys = new Map(first.map((row) => {
          const text = textOf(row.cells[at]);
          return [row, { text, number: numberOf(text), empty: EMPTY.includes(text) }];
        }));
        const numbers = first.some((row) => keys.get(row).number !== null);
        const ways = numbers ? ["descending", "ascending", null] : ["ascending", "descending", null];
        const way = ways[(ways.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
        const turn = way === "descending" ? -1 : 1;
        const rows = [...first];
        if (way) {
          rows.sort((a, b) => {
            const [left, right] = [keys.get(a), keys.get(b)];
            return left.empty || right.empty ? compare(left, right) : turn * compare(left, right);
          });
        }
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (way) head.setAttribute("aria-sort", way);
        body.append(...rows);
        live.textContent = way ? `sorted by ${name}, ${way}` : "in the order of the report";
      });
    });
  };
  every("table.data:not(.parts)").forEach(sortable);

  // ---------------------------------------------------------------------------------- runs

  for (const chooser of every(".chooser")) {
    for (const [name, on] of [["All", true], ["None", false]]) {
      const button = made("button", "", name);
      button.type = "button";
      button.addEventListener("click", () => every("input", chooser).forEach((box) => { box.checked = on; }));
      chooser.append(button);
    }
  }

  // ---------------------------------------------------------------------------------- dials

  for (const stops of every(".stops")) {
    stops.addEventListener("pointermove", (event) => {
      const label = event.target.closest("label");
      if (label && event.buttons === 1) label.control.checked = true;
    });
  }

  // ---------------------------------------------------------------------------------- what scrolls; print

  const scrollers = () => {
    for (const box of every(".scroll")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  scrollers();
  addEventListener("resize", scrollers);

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = every("details:not([open])");
    closed.forEach((fold) => { fold.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((fold) => { fold.open = false; }));
})();
