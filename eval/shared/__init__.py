"""What several tasks compute with: scoring tokens, small trainings, labelled text, other forms of attention."""
