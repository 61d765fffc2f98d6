"""Model -> metrics, each beside what chance would give."""
