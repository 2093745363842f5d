"""What a run writes: its log, its metrics, its environment, and trackers that receive its metrics."""
