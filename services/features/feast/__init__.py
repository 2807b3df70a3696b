"""Feature views to and from Feast, as files: nothing here needs Feast installed."""
