"""A run as one page that opens anywhere: report.html, and compare.html for several runs. Needs the extra `report`."""
