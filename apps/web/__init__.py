"""The web application: pages for people, a JSON API for programs, and the gate in front of both."""
