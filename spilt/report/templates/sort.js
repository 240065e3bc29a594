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
// A link to a cell opens its details.
const reveal = () => { const at = document.getElementById(location.hash.slice(1)); if (at instanceof HTMLDetailsElement) at.open = true; };
addEventListener('hashchange', reveal);
reveal();
