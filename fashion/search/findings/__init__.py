"""What a search found: which settings mattered, their effects, how flat the winner's neighbourhood is. No Ray here."""
