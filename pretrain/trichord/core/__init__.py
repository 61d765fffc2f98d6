"""What every room may use: errors, logging, rank facts, seeds, schedules, the base of config leaves. No torch."""
