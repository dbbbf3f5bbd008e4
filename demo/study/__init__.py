"""Everything that trains, measures and draws the demo model; needs the whole repository."""
