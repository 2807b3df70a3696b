"""Avro in the Confluent wire format, by columns."""
