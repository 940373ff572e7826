"""Where records come from: each module turns one kind of source into a MEDS dataset; the rest knows only that."""
