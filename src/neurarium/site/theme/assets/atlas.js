/* On every page but the gallery: / goes to the gallery's search. */
(function () {
  "use strict";
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName) || document.getElementById("q")) return;
    const home = document.querySelector(".md-tabs__link, .md-header__button.md-logo");
    if (home) { event.preventDefault(); location.href = home.href; }
  });
})();
