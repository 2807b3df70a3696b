"""Real flights of 2013 through the mesh: airlines are the tenants, late arrivals the question."""
