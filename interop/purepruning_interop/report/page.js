"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  /** Returns an element with attributes and children; `svg:` names one of SVG. */
  function make(name, attributes = {}, ...children) {
    const svg = name.startsWith("svg:");
    const element = svg ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value === true) element.setAttribute(key, "");
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  const dataOf = (element) => JSON.parse(document.getElementById(element.dataset.for).textContent);

  const counter = (() => { let n = 0; return () => `part-${n++}`; })();

  /** Returns round numbers that cover an interval. */
  function ticks(low, high, n) {
    const raw = (high - low) / n || 1;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 2.5, 5, 10].find((m) => m * unit >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  const trimmed = (x, digits) => String(Number(x.toFixed(digits))).replace("-", "−");

  // Curves.

  /** The outline of marker number i around the origin. */
  const MARKERS = [
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.5,-3.5h7v7h-7z", "M0,-4.6L4.4,3.4H-4.4z", "M0,-5L5,0L0,5L-5,0z",
    "M0,4.6L4.4,-3.4H-4.4z", "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z", "M-4.7,-1.6L0,-5L4.7,-1.6L2.9,4H-2.9z", "M-4.5,-2.2h9v4.4h-9z",
  ];

  const colorOf = (series) => (series.baseline ? "var(--muted)" : `var(--c${series.color})`);

  function curves(root) {
    const data = dataOf(root);
    const state = { view: 0, hidden: new Set() };
    const shown = (x) => (data.percent ? 100 * x : x);
    const number = (x, signed) =>
      (signed && x > 0 ? "+" : "") + (data.percent ? (100 * x).toFixed(1) : trimmed(x, 4)).replace("-", "−");
    const place = (x) => (data.x_scale === "left" ? -Math.log(1 - x) : x);
    const xText = (x) => (data.percent ? `${trimmed(100 * x, 2)}\u00a0%` : trimmed(x, 4));

    const xName = data.x_label.replace(/, %$/, "");

    if (data.views.length > 1) {
      const name = counter();
      const choice = make("div", { class: "choice" });
      data.views.forEach((view, i) => {
        choice.append(make("label", {},
          make("input", { type: "radio", name, checked: i === 0, onchange: () => { state.view = i; draw(); } }), view.name));
      });
      root.append(make("div", { class: "controls" }, make("fieldset", {}, make("legend", {}, "Show"), choice)));
    }
    const panels = make("div", { class: "panels" });
    root.append(panels);
    const names = [...new Set(data.views.flatMap((view) => view.series.map((s) => s.panel)))];
    const parts = names.map((name) => panel(name));
    let width = 0;
    new ResizeObserver(() => {
      if (panels.clientWidth !== width) { width = panels.clientWidth; draw(); }
    }).observe(panels);

    function panel(name) {
      const plot = make("div", { class: "plot" });
      const legend = make("ul", { class: "legend", "aria-label": `Curves${name ? " of " + name : ""}` });
      const part = { name, plot, at: null, strong: null };
      const series = [];
      for (const view of data.views) {
        for (const s of view.series) if (s.panel === name && !series.some((t) => t.name === s.name)) series.push(s);
      }
      for (const s of series) {
        const key = `${name}/${s.name}`;
        const button = make("button", {
          type: "button", "aria-pressed": "true", "data-series": s.name,
          onclick: () => {
            if (!state.hidden.delete(key)) state.hidden.add(key);
            pressed(); draw();
          },
          onpointerenter: () => { part.strong = s.name; mark(part); },
          onpointerleave: () => { part.strong = null; mark(part); },
          onfocus: () => { part.strong = s.name; mark(part); },
          onblur: () => { part.strong = null; mark(part); },
        }, sample(s), s.name);
        s.button = button; s.key = key;
        legend.append(make("li", { "data-name": s.name }, button));
      }
      const pressed = () => series.forEach((s) => s.button.setAttribute("aria-pressed", String(!state.hidden.has(s.key))));
      if (series.length > 3) {
        const all = (hide) => () => {
          for (const s of series) if (hide && !s.baseline) state.hidden.add(s.key); else state.hidden.delete(s.key);
          pressed(); draw();
        };
        legend.append(make("li", {}, make("button", { type: "button", class: "all", onclick: all(false) }, "Show all")));
        legend.append(make("li", {}, make("button", { type: "button", class: "all", onclick: all(true) }, "Hide all")));
      }
      panels.append(make("div", { class: "panel" }, name ? make("h3", {}, name) : "", plot, legend));
      return part;
    }

    function sample(s) {
      const icon = make("svg:svg", { width: 26, height: 12, viewBox: "-13 -6 26 12", "aria-hidden": "true" });
      const stroke = colorOf(s);
      icon.append(make("svg:path", { d: "M-13,0H13", stroke, "stroke-width": 2, "stroke-dasharray": s.baseline ? "6 4" : null }));
      icon.append(make("svg:path", { d: MARKERS[s.baseline ? 0 : s.color], fill: stroke }));
      return icon;
    }

    const visible = (part) =>
      data.views[state.view].series.filter((s) => s.panel === part.name && !state.hidden.has(`${part.name}/${s.name}`));

    function draw() {
      const view = data.views[state.view];
      const all = view.series.flatMap((s) => s.points);
      const heights = all.flatMap((p) => [p[1], p[2] ?? p[1], p[3] ?? p[1]]).concat(Object.values(view.reference));
      if (view.signed) heights.push(0);
      let low = Math.min(...heights), high = Math.max(...heights);
      if (!(high > low)) { low -= 0.5; high += 0.5; }
      const columns = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
      parts.forEach((part) => drawPanel(part, view, low, high, columns));
    }

    function drawPanel(part, view, low, high, columns) {
      const w = Math.max(part.plot.parentElement.clientWidth, 240), h = Math.max(250, Math.min(360, w * 0.72));
      const box = { left: 44, right: w - 12, top: 24, bottom: h - 42 };
      const pad = (high - low) * 0.04;
      const bottom = low - pad, top = high + pad;
      const first = place(columns[0]), last = place(columns[columns.length - 1]);
      const x = (v) => (first === last ? (box.left + box.right) / 2
        : box.left + 14 + (place(v) - first) / (last - first) * (box.right - box.left - 28));
      const y = (v) => box.bottom - (v - bottom) / (top - bottom) * (box.bottom - box.top);
      const svg = make("svg:svg", { viewBox: `0 0 ${w} ${h}`, width: w, height: h, "aria-hidden": "true" });

      const grid = make("svg:g", { class: "grid" });
      for (const v of ticks(shown(bottom), shown(top), 5)) {
        const at = y(data.percent ? v / 100 : v);
        grid.append(make("svg:line", { x1: box.left, x2: box.right, y1: at, y2: at }));
        grid.append(make("svg:text", { x: box.left - 8, y: at + 4, "text-anchor": "end" }, (view.signed && v > 0 ? "+" : "") + trimmed(v, 6)));
      }
      svg.append(grid);
      if (view.signed) svg.append(make("svg:line", { class: "axis", x1: box.left, x2: box.right, y1: y(0), y2: y(0), "stroke-width": 2 }));
      svg.append(make("svg:line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
      let free = -Infinity;
      const marks = columns.length > 12 ? ticks(columns[0], columns[columns.length - 1], 6) : columns;
      for (const v of marks) {
        svg.append(make("svg:line", { class: "axis", x1: x(v), x2: x(v), y1: box.bottom, y2: box.bottom + 4 }));
        if (x(v) - free < 30) continue;
        free = x(v);
        svg.append(make("svg:text", { x: x(v), y: box.bottom + 18, "text-anchor": "middle" }, trimmed(shown(v), 2)));
      }
      svg.append(make("svg:text", { x: (box.left + box.right) / 2, y: h - 5, "text-anchor": "middle" }, data.x_label));
      svg.append(make("svg:text", { x: 0, y: 6, "dominant-baseline": "middle" }, view.y_label));
      for (const [label, v] of Object.entries(view.reference)) {
        svg.append(make("svg:g", { class: "reference" },
          make("svg:line", { x1: box.left, x2: box.right, y1: y(v), y2: y(v) }),
          make("svg:text", { x: box.right, y: y(v) - 6, "text-anchor": "end" }, label)));
      }
      part.cursor = make("svg:line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
      svg.append(part.cursor);

      for (const item of part.plot.parentElement.querySelectorAll(".legend [data-name]")) {
        item.hidden = !view.series.some((s) => s.panel === part.name && s.name === item.dataset.name);
      }
      const list = visible(part);
      list.forEach((s, i) => {
        const stroke = colorOf(s), shift = columns.length > 1 ? (i - (list.length - 1) / 2) * Math.min(1.6, 16 / list.length) : 0;
        const g = make("svg:g", { class: s.baseline ? "series baseline" : "series", "data-series": s.name });
        const edge = s.points.filter((p) => p[2] !== null && p[3] !== null);
        if (edge.length > 1) {
          const there = edge.map((p) => `${x(p[0])},${y(p[3])}`), back = edge.map((p) => `${x(p[0])},${y(p[2])}`).reverse();
          g.append(make("svg:path", { class: "spread", d: `M${there.concat(back).join("L")}Z`, style: `fill:${stroke}` }));
        }
        g.append(make("svg:path", { class: "line", d: "M" + s.points.map((p) => `${x(p[0])},${y(p[1])}`).join("L"), stroke }));
        for (const p of edge) {
          const at = x(p[0]) + shift;
          g.append(make("svg:path", { class: "whisker", d: `M${at},${y(p[2])}V${y(p[3])}`, stroke }));
        }
        if (s.points.length <= 30) {
          for (const p of s.points) {
            g.append(make("svg:path", { class: "marker", d: MARKERS[s.baseline ? 0 : s.color], fill: stroke, transform: `translate(${x(p[0])},${y(p[1])})` }));
          }
        }
        svg.append(g);
      });

      Object.assign(part, { columns, x, box, w, view, list });
      part.readout = make("div", { class: "readout", hidden: true });
      part.slider = make("div", {
        class: "plot-focus", role: "slider", tabindex: "0",
        "aria-label": `Values${part.name ? " of " + part.name : ""} by ${xName}`,
        "aria-valuemin": 0, "aria-valuemax": columns.length - 1,
        onkeydown: (event) => moved(event, part),
        onblur: () => point(part, null),
        onfocus: () => point(part, part.at ?? 0),
        onpointermove: (event) => point(part, nearest(part, event)),
        onpointerdown: (event) => point(part, nearest(part, event)),
        onpointerleave: () => { if (document.activeElement !== part.slider) point(part, null); },
      }, svg);
      speak(part, part.at ?? 0);
      const focused = part.plot.contains(document.activeElement);
      part.plot.replaceChildren(part.slider, part.readout);
      if (focused) part.slider.focus();
      mark(part);
    }

    function nearest(part, event) {
      const at = event.clientX - part.plot.getBoundingClientRect().left;
      const far = part.columns.map((v) => Math.abs(part.x(v) - at));
      return far.indexOf(Math.min(...far));
    }

    function moved(event, part) {
      const last = part.columns.length - 1, now = part.at ?? 0;
      const to = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") point(part, null);
      if (to === undefined) return;
      event.preventDefault();
      point(part, Math.max(0, Math.min(last, to)));
    }

    /** Returns the series with a value at a column, the highest first. */
    function valuesAt(part, i) {
      return part.list
        .map((s) => [s, s.points.find((p) => p[0] === part.columns[i])])
        .filter(([, p]) => p)
        .sort((a, b) => b[1][1] - a[1][1]);
    }

    const spread = (p, signed) =>
      (p[2] === null ? "" : signed || !data.percent ? `[${number(p[2], signed)}, ${number(p[3], signed)}]` : `± ${((shown(p[3]) - shown(p[2])) / 2).toFixed(1)}`);

    function speak(part, i) {
      const signed = part.view.signed;
      const values = valuesAt(part, i).map(([s, p]) => `${s.name} ${number(p[1], signed)} ${spread(p, signed)}`.trim());
      part.slider.setAttribute("aria-valuenow", i);
      part.slider.setAttribute("aria-valuetext", `${xText(part.columns[i])}: ${values.join(", ") || "no curves shown"}`);
    }

    function point(part, i) {
      part.at = i;
      part.cursor.setAttribute("visibility", i === null ? "hidden" : "visible");
      part.readout.hidden = i === null;
      if (i === null) return;
      const at = part.x(part.columns[i]), signed = part.view.signed;
      part.cursor.setAttribute("x1", at);
      part.cursor.setAttribute("x2", at);
      speak(part, i);
      const rows = valuesAt(part, i).map(([s, p]) => {
        const name = make("td", {}, sample(s), " ", s.name);
        return make("tr", {}, name, make("td", {}, number(p[1], signed)), make("td", {}, make("i", {}, spread(p, signed))));
      });
      part.readout.replaceChildren(make("b", {}, `${xName}: ${xText(part.columns[i])}`), make("table", {}, ...rows));
      const wide = part.readout.offsetWidth;
      const right = at + 14 + wide <= part.w;
      part.readout.style.left = `${Math.max(0, Math.min(part.w - wide, right ? at + 14 : at - 14 - wide))}px`;
      // On a narrow screen it lies under the plot, where it hides nothing.
      part.readout.style.top = wide > part.w * 0.45 ? "100%" : "0";
    }

    function mark(part) {
      const strong = part.list && part.list.some((s) => s.name === part.strong) ? part.strong : null;
      part.plot.classList.toggle("dimmed", strong !== null);
      for (const g of part.plot.querySelectorAll(".series")) g.classList.toggle("strong", g.dataset.series === strong);
    }
  }

  // Tables.

  function table(root) {
    const body = root.querySelector("tbody"), heads = [...root.querySelectorAll("thead th")];
    const rows = [...body.rows];
    const status = make("p", { class: "status", role: "status" });
    root.after(status);
    const chosen = new Map();
    let order = "";

    heads.forEach((head, column) => {
      const name = head.textContent;
      head.setAttribute("aria-sort", "none");
      head.replaceChildren(make("button", { type: "button", onclick: () => sort(column, name) }, name));
    });

    const controls = make("div", { class: "controls" });
    heads.forEach((head, column) => {
      if (!("choose" in head.dataset)) return;
      const values = [...new Set(rows.map((row) => row.cells[column].textContent))];
      const select = make("select", {
        onchange: () => {
          if (select.value) chosen.set(column, select.value); else chosen.delete(column);
          filter();
        },
      }, make("option", { value: "" }, "all"), ...values.map((v) => make("option", {}, v)));
      controls.append(make("label", {}, head.textContent, select));
    });
    if (controls.children.length) root.before(controls);

    const key = (row, column) => {
      const cell = row.cells[column];
      return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key);
    };

    function sort(column, name) {
      const head = heads[column];
      const numeric = rows.some((row) => row.cells[column].dataset.key !== undefined);
      const before = head.getAttribute("aria-sort");
      const down = before === "none" ? numeric : before === "ascending";
      heads.forEach((h) => h.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return down ? -less : less;
      };
      body.append(...rows.sort(compare));
      order = `, sorted by ${name}, ${down ? "largest" : "smallest"} first`;
      filter();
    }

    function filter() {
      let n = 0;
      for (const row of rows) {
        row.hidden = [...chosen].some(([column, value]) => row.cells[column].textContent !== value);
        n += !row.hidden;
      }
      status.textContent = `${n} of ${rows.length} rows${order}`;
    }
    filter();
  }

  // Layer profiles.

  function profile(root) {
    const data = dataOf(root), titles = Object.keys(data.choices);
    const at = titles.map((_, i) => data.start[i] ?? 0);
    const largest = Math.max(...data.layers.map((layer) => layer[2]));
    const controls = make("div", { class: "controls" });
    titles.forEach((title, i) => {
      const select = make("select", { onchange: () => { at[i] = select.selectedIndex; draw(); } },
        ...data.choices[title].map((name, j) => make("option", { selected: j === at[i] }, name)));
      controls.append(make("label", {}, title, select));
    });
    if (titles.length) root.append(controls);
    const body = make("tbody");
    root.append(make("table", { class: "layers" },
      make("thead", {}, make("tr", {}, ...[["layer", ""], ["shape", "shape"], ["weights", "number"], ["left", "number"], ["", "bar"]].map(
        ([name, kind]) => (name ? make("th", { scope: "col", class: kind }, name) : make("td", { class: kind }))))), body));

    function draw() {
      const kept = at.reduce((nested, i) => nested[i], data.kept);
      body.replaceChildren(...data.layers.map(([name, shape, size], i) => {
        const share = kept[i] / size;
        // The lengths of bars are as square roots, or nothing would be seen of small layers.
        const bar = make("div", { style: `width:${100 * Math.sqrt(size / largest)}%` }, make("div", { style: `width:${100 * share}%` }));
        return make("tr", {},
          make("th", { scope: "row" }, name), make("td", { class: "shape" }, shape),
          make("td", { class: "number" }, size.toLocaleString("en")),
          make("td", { class: "number" }, `${(100 * share).toFixed(1)} %`),
          make("td", { class: "bar", "aria-hidden": "true" }, bar));
      }));
    }
    draw();
  }

  function commands(root) {
    const button = make("button", {
      type: "button", class: "copy",
      onclick: async () => {
        const text = root.querySelector("code").textContent;
        try {
          await navigator.clipboard.writeText(text);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(root.querySelector("code"));
          button.textContent = "Selected";
        }
      },
    }, "Copy");
    root.append(button);
  }

  document.querySelectorAll(".curves").forEach(curves);
  document.querySelectorAll(".table").forEach(table);
  document.querySelectorAll(".profile").forEach(profile);
  document.querySelectorAll(".commands").forEach(commands);
})();
