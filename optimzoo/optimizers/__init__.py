"""One algorithm, one file: its options, its slots, its direction."""
