"""What users said: capture records, ratings, privacy, and the snapshots that training reads."""
