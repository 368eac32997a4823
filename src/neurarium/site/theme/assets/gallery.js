/* The gallery: filters, search, keyboard; the address after # keeps what is chosen. */
(function () {
  "use strict";
  const search = new window.NeurariumSearch(window.NEURARIUM);
  const list = document.getElementById("cards"), box = document.getElementById("q"), count = document.getElementById("count");
  const none = document.getElementById("none"), cards = [...list.children], chips = [...document.querySelectorAll(".chip")];
  const selects = [...document.querySelectorAll("select[data-filter]")], resets = [...document.querySelectorAll(".reset")];
  const places = [...document.querySelectorAll(".chart a[data-id]")], islands = [...document.querySelectorAll(".chart .island")];
  const NAMES = ["q", "room", "role", "status", "verdict"];
  let state = {};

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    state = {};
    for (const name of NAMES) if (asked.get(name)) state[name] = asked.get(name);
    for (const select of selects) {
      select.value = state[select.dataset.filter] || "";
      if (select.selectedIndex < 0) select.value = "";
    }
    if (box.value.trim() !== (state.q || "")) box.value = state.q || "";
    for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.room === state.room));
  }
  function write() {
    const kept = new URLSearchParams();
    for (const name of NAMES) if (state[name]) kept.set(name, state[name]);
    const hash = String(kept);
    history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  }
  function show() {
    const found = state.q ? search.find(state.q) : null;
    const fits = (card) =>
      (!state.room || card.dataset.room === state.room) && (!state.role || card.dataset.role === state.role) &&
      (!state.status || card.dataset.status === state.status) && (!state.verdict || card.dataset.verdict.split(" ").includes(state.verdict)) &&
      (!found || found.has(card.dataset.id));
    const shown = cards.filter(fits);
    if (found) shown.sort((a, b) => found.get(b.dataset.id) - found.get(a.dataset.id));
    const chosen = new Set(shown);
    for (const card of cards) card.hidden = !chosen.has(card);
    list.append(...shown, ...cards.filter((card) => !chosen.has(card)));
    const ids = new Set(shown.map((card) => card.dataset.id)), all = shown.length === cards.length;
    for (const place of places) place.classList.toggle("off", !all && !ids.has(place.dataset.id));
    for (const island of islands) island.classList.toggle("off", !all && !island.querySelector("a[data-id]:not(.off)"));
    count.textContent = all ? `${cards.length} papers` : `${shown.length} of ${cards.length} papers${found && shown.length ? ", best match first" : ""}`;
    none.hidden = shown.length > 0;
    resets.forEach((reset) => { if (reset.closest(".bar")) reset.hidden = !Object.keys(state).length; });
  }
  function set(name, value) {
    if (value) state[name] = value; else delete state[name];
    write(); read(); show();
  }
  function visible() {
    return cards.filter((card) => !card.hidden).sort((a, b) => (a.compareDocumentPosition(b) & 4 ? -1 : 1)).map((card) => card.querySelector("h3 a"));
  }
  /* The card in the wanted direction: the next one, or the nearest one of the row above or below. */
  function move(key) {
    const links = visible(), here = links.indexOf(document.activeElement);
    if (!links.length) return false;
    if (here < 0) { if (document.activeElement === box && key === "ArrowDown") { links[0].focus(); return true; } return false; }
    if (key === "ArrowRight" || key === "ArrowLeft") { (links[here + (key === "ArrowRight" ? 1 : -1)] || links[here]).focus(); return true; }
    const at = links.map((link) => link.closest(".card").getBoundingClientRect()), from = at[here], sign = key === "ArrowDown" ? 1 : -1;
    const rows = at.map((r, i) => [i, sign * (r.top - from.top), Math.abs(r.left - from.left)]).filter((r) => r[1] > 8);
    if (!rows.length) { if (sign < 0) box.focus(); return true; }
    const nearest = Math.min(...rows.map((r) => r[1]));
    links[rows.filter((r) => r[1] < nearest + 8).sort((a, b) => a[2] - b[2])[0][0]].focus();
    return true;
  }

  box.addEventListener("input", () => set("q", box.value.trim()));
  for (const select of selects) select.addEventListener("change", () => set(select.dataset.filter, select.value));
  for (const chip of chips) chip.addEventListener("click", () => set("room", chip.dataset.room === state.room ? "" : chip.dataset.room));
  for (const reset of resets) reset.addEventListener("click", () => { state = {}; write(); read(); show(); box.focus(); });
  window.addEventListener("hashchange", () => { read(); show(); });
  /* Before the theme's own shortcuts, which would take / and the arrows. */
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing) { box.focus(); box.select(); }
    else if (event.key === "Escape" && document.activeElement === box && box.value) set("q", "");
    else if (event.key === "Enter" && document.activeElement === box) { const first = visible()[0]; if (first && state.q) first.click(); return; }
    else if (/^Arrow/.test(event.key) && (!typing || (document.activeElement === box && event.key === "ArrowDown"))) { if (!move(event.key)) return; }
    else return;
    event.preventDefault(); event.stopPropagation();
  }, true);
  read(); show();
})();
