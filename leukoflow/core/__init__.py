"""What everything else is made of: errors, settings, geometry. Imports nothing else of leukoflow."""
