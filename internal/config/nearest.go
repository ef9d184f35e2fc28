package config

import "strings"

// maxNear bounds the words that are compared: nothing that we know is longer.
const maxNear = 32

// nearest returns the candidate that word is most likely a slip of, or "".
func nearest(word string, candidates []string) string {
	if len(word) > maxNear {
		return ""
	}
	best, distance := "", max(len(word)/3, 1)+1
	for _, c := range candidates {
		// Strictly nearer, so the earlier of two equals wins.
		if d := slips(fold(word), fold(c)); d < distance {
			best, distance = c, d
		}
	}
	return best
}

// fold removes the differences that are never meant.
func fold(s string) string { return strings.ReplaceAll(strings.ToLower(s), "-", "_") }

// slips counts the letters to insert, remove, replace or swap with their
// neighbour to make b of a.
func slips(a, b string) int {
	previous, current := make([]int, len(b)+1), make([]int, len(b)+1)
	var before []int
	for j := range current {
		current[j] = j
	}
	for i := range len(a) {
		before, previous, current = previous, current, make([]int, len(b)+1)
		current[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			current[j+1] = min(previous[j+1]+1, current[j]+1, previous[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				current[j+1] = min(current[j+1], before[j-1]+1)
			}
		}
	}
	return current[len(b)]
}

// didYouMean is the hint for a word that is not among the candidates.
func didYouMean(word string, candidates []string) string {
	if c := nearest(word, candidates); c != "" {
		return `did you mean "` + c + `"?`
	}
	return ""
}
