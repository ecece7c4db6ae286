"""Generation: engines behind one Protocol, the graders, and the producer that turns prompts into graded groups."""
