"""The shadow MMU: pages that follow guest tables, and direct roots without the TDP MMU."""
