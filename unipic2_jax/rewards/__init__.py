"""Rewards behind one interface, and what calls, combines and audits them; it imports models and what is below them."""
