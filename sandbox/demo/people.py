"""Who stands in the demo market."""

STAFF = "staff@tailrace.example"
OPERATOR = "operator@tailrace.example"
CUSTOMER = "customer@tailrace.example"
