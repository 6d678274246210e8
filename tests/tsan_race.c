// For test_thread_sanitizer.py: a sum over threads with a race and one without.

int sum_with_a_race(int n) {
  int sum = 0;
#pragma omp parallel for num_threads(4)
  for (int i = 0; i < n; ++i) sum += i;
  return sum;
}

int sum_without(int n) {
  int sum = 0;
#pragma omp parallel for num_threads(4) reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += i;
  return sum;
}
