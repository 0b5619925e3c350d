"""One module per model family; `registry` finds them by name."""
