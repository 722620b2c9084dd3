"""Tests of the dialects, and the check they share with the tests of inference and rewriting."""
