# keyturn needs Go and make, nothing else, to build and to test. What each
# target needs beyond that stands beside it.

GO        ?= go
FUZZTIME  ?= 5s
BENCHTIME ?= 1s

LINT := bin/golangci-lint

# Every build of the binary is the same on every machine: no C, no paths.
BUILD := CGO_ENABLED=0 $(GO) build -trimpath

.PHONY: build test race lint fmt fuzz bench e2e faults soak mutation explore clean help

build: ## build bin/keyturn
	$(BUILD) -o bin/keyturn ./cmd/keyturn

test: ## run the unit, property and virtual-time tests
	$(GO) test ./...

# One processor: in Go 1.26 all of a synctest bubble's timers share one context of
# the race detector, which two processors at once corrupt (SIGSEGV in the runtime).
race: ## the same under the race detector (needs a C compiler)
	$(GO) test -race -cpu 1 -short ./...

lint: $(LINT) ## gofmt, go vet and golangci-lint (built once from tools/go.mod: minutes)
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "run make fmt:"; echo "$$unformatted"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags e2e,mutation,vm ./...
	$(LINT) run ./...

$(LINT): tools/go.mod tools/go.sum
	cd tools && $(GO) build -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

fmt: ## format all Go files
	gofmt -w .

fuzz: ## fuzz every target for FUZZTIME (5s)
	tools/fuzz $(FUZZTIME)

bench: ## run every benchmark for BENCHTIME (1s)
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) ./...

e2e: ## the real binary in network namespaces (needs iproute2, and root or user namespaces)
	$(GO) test -tags e2e -count 1 -timeout 15m ./e2e/

faults: ## every fault with the real binary in namespaces, link beside and inside (25 min): writes docs/RELIABILITY.md
	@KEYTURN_E2E=required KEYTURN_FAULTS=$(CURDIR)/docs/RELIABILITY.md KEYTURN_COMMIT=$$(git describe --always --dirty) \
		$(GO) test -tags e2e -count 1 -timeout 30m -run '^TestRecovery$$' ./e2e/ -parallel 48; \
		status=$$?; cat docs/RELIABILITY.md; exit $$status

vm: ## the real binary on the kernel's WireGuard, in virtual machines (needs Debian with qemu-system-x86)
	$(GO) test -tags vm -count 1 -timeout 60m -skip '^TestPair$$' -v ./e2e/vm/
	$(GO) test -tags vm -count 1 -timeout 60m -run '^TestPair$$' -v ./e2e/vm/

soak: ## run the adversary for long: KEYTURN_SOAK checks of each property (5000), and virtual weeks with and without faults; a failing run prints its seed
	KEYTURN_SOAK=$${KEYTURN_SOAK:-5000} $(GO) test -count 1 -timeout 0 -v -run 'TestAdversary|TestNoLoss' ./internal/rotation/
	KEYTURN_SOAK=1 $(GO) test -count 1 -timeout 0 -v -run 'TestWeek' ./internal/daemon/

mutation: ## take the rules of the protocol out one by one: a test must go red each time
	$(GO) test -tags mutation -count 1 ./internal/rotation/...

explore: ## explore the model of the swap in full (docs/MODEL.md): some minutes
	KEYTURN_EXPLORE=full $(GO) test -count 1 -timeout 2h -v -run 'TestExplore$$' ./internal/rotation/

clean: ## remove what was built
	rm -rf bin dist

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
