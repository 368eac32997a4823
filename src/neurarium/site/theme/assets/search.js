/* Ranked search over the papers: BM25 on weighted fields, tolerant of word endings and of small typos, as neurarium.catalog.search does it. */
(function () {
  "use strict";
  const WEIGHTS = { id: 4, title: 3, methods: 3, role: 2, room: 2, summary: 1, claims: 0.5 };
  const K1 = 1.2, B = 0.5, MAX_WORDS = 32;
  const STOP = new Set("a an and are as at by for from in into is it its of on or that the this to via with".split(" "));
  const ENDINGS = ("izations isations ization isation izing ising ized ised izes ises ize ise ations ation ings ing ions ion ies ers er ed es s e y").split(" ");

  function words(text) {
    const split = text.replace(/([a-z])([A-Z])/g, "$1 $2"); // ClassNames by their parts too
    const plain = (text + " " + (split === text ? "" : split)).normalize("NFKD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
    return (plain.match(/[a-z0-9]+/g) || []).filter((word) => !STOP.has(word));
  }
  function stem(word) {
    for (const end of ENDINGS) if (word.endsWith(end) && word.length - end.length >= 4) return word.slice(0, -end.length);
    return word;
  }
  /* Whether two words are within so many insertions, deletions, substitutions or swaps of neighbours. */
  function within(a, b, edits) {
    let last, before = [], row = Array.from({ length: b.length + 1 }, (_, j) => j);
    for (let i = 1; i <= a.length; i++) {
      last = before; before = row; row = [i];
      for (let j = 1; j <= b.length; j++) {
        let cost = Math.min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a[i - 1] !== b[j - 1]));
        if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) cost = Math.min(cost, last[j - 2] + 1);
        row.push(cost);
      }
      if (Math.min(...row) > edits) return false;
    }
    return row[b.length] <= edits;
  }

  class Search {
    constructor(documents) {
      this.postings = new Map();
      this.lengths = documents.map((doc, n) => {
        let length = 0;
        for (const [name, weight] of Object.entries(WEIGHTS)) {
          for (const word of words(doc[name] || "")) {
            const term = stem(word);
            let found = this.postings.get(term);
            if (!found) this.postings.set(term, (found = new Map()));
            found.set(n, (found.get(n) || 0) + weight);
            length += weight;
          }
        }
        return length;
      });
      this.mean = this.lengths.reduce((a, b) => a + b, 0) / Math.max(this.lengths.length, 1) || 1;
      this.ids = documents.map((doc) => doc.id);
    }
    /* id -> score; every word of the query must match, and if no paper has them all, some. */
    find(query) {
      const asked = [...new Set(words(query).slice(0, MAX_WORDS))];
      const scores = new Map(), hits = new Map();
      for (const word of asked) {
        const best = new Map();
        for (const [term, weight] of this.matches(stem(word), word)) {
          const postings = this.postings.get(term);
          const rarity = Math.log(1 + (this.lengths.length - postings.size + 0.5) / (postings.size + 0.5));
          for (const [n, count] of postings) {
            const norm = count + K1 * (1 - B + (B * this.lengths[n]) / this.mean);
            best.set(n, Math.max(best.get(n) || 0, (weight * rarity * count * (K1 + 1)) / norm));
          }
        }
        for (const [n, score] of best) {
          scores.set(n, (scores.get(n) || 0) + score);
          hits.set(n, (hits.get(n) || 0) + 1);
        }
      }
      const most = Math.max(0, ...hits.values());
      return new Map([...scores].filter(([n]) => hits.get(n) === most).sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([n, s]) => [this.ids[n], s]));
    }
    matches(word, typed) {
      const found = new Map();
      if (this.postings.has(word)) found.set(word, 1);
      if (typed.length >= 2)
        for (const term of this.postings.keys()) if (term !== word && (term.startsWith(word) || term.startsWith(typed))) found.set(term, 0.8);
      if (!found.size && word.length >= 4) {
        const edits = typed.length >= 8 ? 2 : 1;
        for (const term of this.postings.keys()) if (Math.abs(term.length - word.length) <= edits && within(word, term, edits)) found.set(term, 0.6);
      }
      return found;
    }
  }
  window.NeurariumSearch = Search;
})();
