"""Published samplers' own outputs, and how each is run here: `cases` loads them, `networks` are their models, `peers` the table."""
