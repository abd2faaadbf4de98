"""Everything that people see: progress on stderr, tables on stdout, one ``error:`` and one ``hint:`` line."""
