"""The paper's tables of what is measured (`spilt table`): sets.py says what is compared, made.py and disturbed.py make the tables,
text.py writes them."""

from spilt.report.comparison.made import averages, fits, make
from spilt.report.comparison.sets import Set, collect, told_on
from spilt.report.comparison.text import Table, csv, html, latex, markdown
