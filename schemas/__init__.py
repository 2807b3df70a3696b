"""The contracts: record schemas and the catalogue of topics, as package data."""
