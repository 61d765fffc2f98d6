"""What this machine reaches, measured against a stated baseline in the same run."""
