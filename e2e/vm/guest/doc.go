// Package guest holds the tests that run inside the virtual machine of
// e2e/vm. The test binary is the guest's first process as well (main_test.go).
package guest
