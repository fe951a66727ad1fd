"""Whether two short answers say the same: words, choices, numbers with units, dates, lists, mathematics."""
