// csrc/cpu under the address and the undefined-behaviour sanitizer: every array here is a block of the heap of just its
// size, so one element too far ends the program. Compiled and run by test_cpp_bounds.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kmeans_assign.h"
#include "../../csrc/cpu/ops.h"
#include "../../csrc/cpu/tar_members.h"

using namespace diffprune::cpu;

namespace {

std::minstd_rand numbers(1);

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// [n, d] with `stride` between rows; the last row ends the block.
template <class Number>
std::vector<Number> rows(int64_t n, int64_t d, int64_t stride, Number (*make)(float)) {
  std::vector<Number> values(n == 0 ? 0 : (n - 1) * stride + d);
  for (auto& value : values) value = make(std::normal_distribution<float>()(numbers));
  values.shrink_to_fit();
  return values;
}

float single(float value) { return value; }
double twice(float value) { return value; }
uint16_t bfloat16(float value) {
  uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  __builtin_memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}
uint16_t float16(float) { return static_cast<uint16_t>(0x3000 + numbers() % 0x0c00); }  // from 0.125 to 1

template <class Number>
void assign(Type type, Number (*make)(float), int64_t n, int64_t k, int64_t d, int64_t stride, int threads,
            float hidden = 0) {
  const auto points = rows(n, d, stride, make);
  auto centroids = rows(k, d, d, single);
  if (hidden > 0)  // by the last dimension, so that more centroids may be the nearest than a row has room for
    for (int64_t i = 0; i < k * d; ++i) centroids[i] = i % d == d - 1 ? (i / d % 2 ? 1.f : -1.f) : hidden * centroids[i];
  const std::vector<float> centre(d, 0.25f);
  for (const auto& variant : variants()) {
    std::vector<int32_t> assignment(n, -1);
    std::vector<float> sqdistance(n, -1);
    const CentroidSearch search(variant, address(centroids.data()), address(centre.data()), k, d, threads);
    for (int block = 0; block < 2; ++block)
      search.assign(address(points.data()), static_cast<int>(type), stride, n, address(assignment.data()),
                    address(sqdistance.data()), threads);
    for (int64_t i = 0; i < n; ++i)
      if (assignment[i] < 0 || assignment[i] >= k || !(sqdistance[i] >= 0)) {
        std::fprintf(stderr, "%s n=%ld k=%ld d=%ld: row %ld got %d\n", variant.c_str(), long(n), long(k), long(d), long(i), assignment[i]);
        std::exit(1);
      }
  }
}

template <class Number>
void update(Type type, Number (*make)(float), int64_t n, int64_t k, int64_t d, int64_t stride, bool weighted, int threads) {
  const auto points = rows(n, d, stride, make);
  std::vector<int32_t> labels(n);
  for (auto& label : labels) label = static_cast<int32_t>(numbers() % k);
  const std::vector<double> weights(weighted ? n : 0, 0.5);
  std::vector<double> sums(k * d, NAN);
  std::vector<int64_t> counts(k, -1);
  kmeans_update(address(points.data()), static_cast<int>(type), stride, address(labels.data()),
                weighted ? address(weights.data()) : 0, n, k, d, address(sums.data()), address(counts.data()), threads);
  int64_t total = 0;
  for (const auto count : counts) total += count;
  bool whole = total == n;
  for (const auto sum : sums) whole = whole && sum == sum;
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = n - 1 - i;
  const std::vector<int32_t> zeros(n), backwards(labels.rbegin(), labels.rend());
  for (const bool exact : {false, true}) {
    if (!exact && weighted) continue;
    std::vector<double> bins((exact ? 2 : 1) * k * d, 0.0);
    const auto add = [&](bool ordered, const std::vector<int32_t>& to, const std::vector<int32_t>* from) {
      add_exactly(address(points.data()), static_cast<int>(type), stride, ordered ? address(order.data()) : 0,
                  address(to.data()), from ? address(from->data()) : 0, weighted ? address(weights.data()) : 0, n, k, d,
                  exact ? std::vector<double>{0x1p-20, 0x1p-60} : std::vector<double>{}, address(bins.data()), threads);
    };
    add(false, zeros, nullptr);
    add(true, backwards, &zeros);
    for (int64_t i = 0; i < k * d; ++i)
      whole = whole && std::fabs(bins[i] + (exact ? bins[k * d + i] : 0) - sums[i]) < 1e-6;
  }
  if (!whole) {
    std::fprintf(stderr, "sums n=%ld k=%ld d=%ld\n", long(n), long(k), long(d));
    std::exit(1);
  }
}

// Headers of plain files, some with a few bytes changed, cut anywhere, in windows and files of any place and size.
void tars() {
  const auto number = [](int64_t below) { return static_cast<int64_t>(numbers() % below); };
  const std::string odd("\0 0127x/.\x80\xff", 11);
  for (int round = 0; round < 20000; ++round) {
    std::vector<char> window(number(6) * 512 + number(512));
    for (size_t at = 0; at + 512 <= window.size(); at += 512) {
      char* header = &window[at];
      std::snprintf(header, 100, "k%ld.e%ld", long(number(3)), long(number(3)));
      for (const int field : {100, 108, 116}) std::snprintf(header + field, 8, "0000644");
      std::snprintf(header + 124, 12, "%011lo", long(number(4) ? 0 : numbers()));
      std::snprintf(header + 136, 12, "%011o", 1);
      header[156] = '0';
      for (int64_t changes = number(3); changes--;) header[number(512)] = odd[number(11)];
      unsigned sum = 8 * ' ';
      for (int i = 0; i < 512; ++i) sum += i < 148 || i >= 156 ? static_cast<unsigned char>(header[i]) : 0;
      if (number(5)) std::snprintf(header + 148, 7, "%06o", sum), header[155] = ' ';
    }
    const std::string_view seen(window.data(), window.size());
    TarMembers members;
    if (seen.size() >= 512) members.trust(seen.substr(0, 512));
    const int64_t base = number(2) ? numbers() : 0, size = number(4) ? INT64_MAX - number(3) : numbers();
    const auto [next, widest] = members.take(seen, base, base + (number(3) ? 0 : number(700)), size);
    if (number(3) == 0) members.add("q.z", next, next, 5, 0);
    members.take(seen, base, next, size);
    const auto found = members.grouped();
    if (next < base || widest < 0 || (found && found->codes.size() != members.members().size())) std::exit(1);
  }
}

}  // namespace

int main() {
  tars();
  for (const int64_t d : {1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 64, 65, 130})
    for (const int64_t k : {1, 2, 15, 16, 17, 33, 130})
      for (const int64_t n : {0, 1, 2, 3, 5, 31, 33}) {
        const int64_t stride = d + (n % 2);
        assign(Type::float32, single, n, k, d, stride, 1);
        assign(Type::float16, float16, n, k, d, stride, 1);
        assign(Type::bfloat16, bfloat16, n, k, d, stride, 2);
        update(Type::float32, single, n, k, d, stride, false, 1);
        update(Type::float64, twice, n, k, d, stride, true, 2);
        update(Type::float16, float16, n, k, d, stride, true, 1);
      }
  assign(Type::float32, single, 1300, 600, 20, 20, 2);  // several tasks, several chunks of panels
  for (const float hidden : {1e-20f, 1e-6f, 0.01f, 0.05f}) {
    assign(Type::float32, single, 37, 1500, 40, 43, 1, hidden);
    assign(Type::float16, float16, 37, 1500, 40, 43, 2, hidden);
    assign(Type::bfloat16, bfloat16, 37, 1500, 40, 40, 1, hidden);
  }
  update(Type::bfloat16, bfloat16, 1300, 70, 20, 20, false, 2);
  std::puts("done");
}
