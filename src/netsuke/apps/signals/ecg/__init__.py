"""`netsuke ecg`: intervals, rate, variability and screening from one lead, with a grade or a reason for every number."""
