"use strict";
(() => {
  // --- colours ---
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];
  const names = { auto: "system", light: "light", dark: "dark" };
  const button = document.getElementById("theme");
  const remember = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("harmoq-theme", value);
      return localStorage.getItem("harmoq-theme");
    } catch {
      return null; // a file opened without storage
    }
  };
  const paint = (theme) => {
    root.dataset.theme = theme;
    button.textContent = `Colours: ${names[theme]}`;
    button.setAttribute("aria-label", `Colours: ${names[theme]}; press to change`);
  };
  const kept = remember();
  paint(themes.includes(kept) ? kept : "auto");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
    paint(next);
    remember(next);
  });

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // Calls `move` with the place in `area`, 0..1 in both directions, while a pointer is down.
  const follow = (area, move) => {
    const at = (event) => {
      const box = area.getBoundingClientRect();
      move((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
    area.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      area.setPointerCapture(event.pointerId);
      at(event);
    });
    area.addEventListener("pointermove", (event) => {
      if (area.hasPointerCapture(event.pointerId)) at(event);
    });
  };

  // --- pictures ---
  const setUp = (picture) => {
    const find = (selector) => picture.querySelector(selector);
    const compare = find(".compare");
    const divider = find(".divider");
    const divide = () => compare.style.setProperty("--at", `${divider.value}%`);
    divider.addEventListener("input", divide);
    follow(compare, (x) => {
      divider.value = String(clamp(100 * x, 0, 100));
      divide();
    });
    divide();

    const zoom = find(".zoom");
    const frame = find(".frame");
    const map = find(".map");
    const heat = find(".heat");
    const lenses = [...picture.querySelectorAll(".lens")];
    const width = heat.naturalWidth || heat.width;
    const height = heat.naturalHeight || heat.height;
    let x = Number(picture.dataset.focusX) * width;
    let y = Number(picture.dataset.focusY) * height;
    const side = () => Math.min(Math.round(240 / Number(zoom.value)), width, height);

    const magnify = () => {
      const size = side();
      x = clamp(x, size / 2, width - size / 2);
      y = clamp(y, size / 2, height - size / 2);
      const left = Math.round(x - size / 2);
      const top = Math.round(y - size / 2);
      frame.style.left = `${(100 * left) / width}%`;
      frame.style.top = `${(100 * top) / height}%`;
      frame.style.width = `${(100 * size) / width}%`;
      frame.style.height = `${(100 * size) / height}%`;
      find(".slide output").textContent = `${zoom.value}x`;
      for (const lens of lenses) {
        const context = lens.getContext("2d");
        context.imageSmoothingEnabled = false;
        context.drawImage(find(`img.${lens.dataset.of}`), left, top, size, size, 0, 0, lens.width, lens.height);
      }
    };
    zoom.addEventListener("input", magnify);
    follow(map, (across, down) => {
      x = across * width;
      y = down * height;
      magnify();
    });
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    frame.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      const length = event.shiftKey ? 1 : Math.max(1, side() / 6);
      x += step[0] * length;
      y += step[1] * length;
      magnify();
    });
    magnify();
  };
  for (const picture of document.querySelectorAll(".picture")) {
    const images = [...picture.querySelectorAll("img")];
    Promise.all(images.map((image) => image.decode())).then(() => setUp(picture));
  }

  // --- table of sites ---
  const table = document.getElementById("site-table");
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];

  const sortBy = (column) => {
    const heading = headings[column];
    const next = { none: "ascending", ascending: "descending", descending: "none" }[heading.getAttribute("aria-sort")];
    for (const other of headings) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", next);
    const numeric = heading.firstElementChild.dataset.type === "number";
    const sign = next === "descending" ? -1 : 1;
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      const [p, q] = [value(a), value(b)];
      if (p === "" || q === "") return (p === "") - (q === ""); // nothing comes last either way
      return sign * (numeric ? Number(p) - Number(q) : p.localeCompare(q, "en", { numeric: true }));
    };
    body.append(...(next === "none" ? original : [...original].sort(order)));
  };
  headings.forEach((heading, column) => {
    heading.firstElementChild.addEventListener("click", () => sortBy(column));
  });

  const filter = document.getElementById("filter");
  const only = document.getElementById("only");
  const select = () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const row of original) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted) || (only.checked && row.classList.contains("float"));
      shown += row.hidden ? 0 : 1;
    }
    document.getElementById("count").textContent = `${shown} of ${original.length}`;
  };
  filter.addEventListener("input", select);
  only.addEventListener("change", select);
  select();
})();
