"""From what arrived to a frozen plan: inbox, manifest, patient key, plan, opening of a run."""
