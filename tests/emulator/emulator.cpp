// See emulator.h.
#include "emulator.h"

#include <signal.h>

#include <algorithm>
#include <array>
#include <memory>

namespace emulator {

Thread* self = nullptr;
std::vector<std::function<void()>> bulk_copies;

namespace {

constexpr size_t kStackBytes = 128 * 1024;

std::minstd_rand random_numbers;
bool stragglers = false;
ucontext_t scheduler;
const std::function<void()>* current_kernel = nullptr;
std::string failure;

// A kernel that touches memory that is not there, or several numbers at once from where they do not begin, fails with an
// exception (compiled with -fnon-call-exceptions), not the process with it: tests put arguments right before pages that
// nobody may touch, and -fsanitize=alignment traps with an illegal instruction.
class Faults {
 public:
  Faults() {
    struct sigaction action = {};
    action.sa_flags = SA_NODEFER;  // the handler is left by the exception
    action.sa_handler = [](int) { fail("touches memory beyond an argument"); };
    sigaction(SIGSEGV, &action, &segv);
    action.sa_handler = [](int) { fail("misaligned access"); };
    sigaction(SIGILL, &action, &ill);
  }
  ~Faults() {
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGILL, &ill, nullptr);
  }

 private:
  struct sigaction segv, ill;
};

void body() {
  try {
    (*current_kernel)();
  } catch (const std::exception& error) {
    if (failure.empty()) failure = error.what();
  }
  Thread* thread = self;
  thread->done = true;
  for (Gathering* gathering : {&thread->block->threads, thread->block->cluster_threads,
                               &thread->block->warps[thread->thread.x / 32]}) {
    --gathering->members;
    if (gathering->arrived > 0 && gathering->arrived == gathering->members) {
      gathering->arrived = 0;
      ++gathering->generation;
    }
  }
  swapcontext(&thread->context, &scheduler);
}

void start_bulk_copy(size_t which) {
  const auto copy = std::move(bulk_copies[which]);
  bulk_copies.erase(bulk_copies.begin() + which);
  copy();
}

void run_threads(std::vector<Thread>& threads) {
  std::vector<Thread*> alive;
  for (Thread& thread : threads) alive.push_back(&thread);
  while (!alive.empty()) {
    std::shuffle(alive.begin(), alive.end(), random_numbers);
    bool progress = false;
    for (Thread* thread : alive) {
      if (thread->gathering != nullptr && thread->gathering->generation == thread->generation) continue;
      if (thread->ready && !thread->ready()) continue;
      progress = true;
      if (thread->straggler && random_numbers() % 32 != 0) continue;
      thread->gathering = nullptr;
      thread->ready = nullptr;
      self = thread;
      swapcontext(&scheduler, &thread->context);
      if (!failure.empty()) throw std::runtime_error(failure);
      while (!bulk_copies.empty() && random_numbers() % 64 == 0) start_bulk_copy(random_numbers() % bulk_copies.size());
    }
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Thread* thread) { return thread->done; }), alive.end());
    if (progress || alive.empty()) continue;
    if (bulk_copies.empty()) {
      std::string what = "deadlock:";
      for (size_t i = 0; i < alive.size() && i < 12; ++i)
        what += " block " + std::to_string(alive[i]->block->index.x) + " thread " + std::to_string(alive[i]->thread.x) +
                " waits for " + alive[i]->waits_for + ";";
      throw std::runtime_error(what);
    }
    start_bulk_copy(random_numbers() % bulk_copies.size());
  }
  if (!bulk_copies.empty()) throw std::runtime_error("the kernel ended with bulk copies under way");
}

struct Barrier {
  uint16_t expected, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Barrier) <= 12);

// A barrier is 8 bytes, of which the emulator keeps only a number here.
std::vector<Barrier> barriers;
constexpr uint64_t kBarrierMark = 0xbadba44e00000000;

Barrier& find_barrier(const unsigned char* address) {
  uint64_t mark;
  std::memcpy(&mark, address, 8);
  const uint64_t number = mark ^ kBarrierMark;
  if (number >= barriers.size()) fail("not an initialised mbarrier");
  return barriers[number];
}

void complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  barrier.phase ^= 1;
}

void arrive(Barrier& barrier) {
  if (barrier.pending == 0) fail("mbarrier: more arrivals than it counts");
  --barrier.pending;
  complete(barrier);
}

uint16_t read_bits(uint32_t address) {
  const uint32_t swizzled = address ^ ((address >> 7 & 7) << 4);
  if (swizzled + 2 > uint32_t(self->block->shared_bytes)) fail("wgmma reads outside of shared memory");
  uint16_t bits;
  std::memcpy(&bits, self->block->shared + swizzled, 2);
  return bits;
}

// Where element (row, k) of an operand is: PTX ISA, "Strides" and "Canonical Layouts" of wgmma's matrices, 128-byte swizzle.
uint32_t operand_address(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                 stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("wgmma: expected the 128-byte swizzle, base offset 0");
  if (transposed) return start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128;
  return start + row / 8 * stride + row % 8 * 128 + k * 2;
}

}  // namespace

void fail(const std::string& message) { throw std::runtime_error(message); }

void wait_until(const char* what, std::function<bool()> ready) {
  if (ready()) return;
  self->ready = std::move(ready);
  self->waits_for = what;
  swapcontext(&self->context, &scheduler);
}

void gather(const char* what, Gathering& gathering) {
  if (++gathering.arrived == gathering.members) {
    gathering.arrived = 0;
    ++gathering.generation;
    return;
  }
  self->gathering = &gathering;
  self->generation = gathering.generation;
  self->waits_for = what;
  swapcontext(&self->context, &scheduler);
}

void run(dim3 grid, int threads, int shared_bytes, int cluster, const std::function<void()>& kernel) {
  if (shared_bytes > 227 * 1024) throw std::runtime_error("more shared memory than a block can have");
  if (grid.x % cluster != 0) throw std::runtime_error("the grid is not made of whole clusters");
  static std::vector<unsigned char> stacks;
  stacks.resize(std::max(stacks.size(), kStackBytes * threads * cluster));
  std::vector<unsigned char> memory(cluster * (kSharedBytes + 1024));
  const auto base = reinterpret_cast<uintptr_t>(memory.data());
  current_kernel = &kernel;
  const Faults faults;
  std::vector<std::pair<unsigned, unsigned>> places;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster) places.emplace_back(x, y);
  std::shuffle(places.begin(), places.end(), random_numbers);  // no block may count on another being done
  for (const auto& [x, y] : places) {
    std::fill(memory.begin(), memory.end(), 0xff);  // NaN
    barriers.clear();
    failure.clear();
    bulk_copies.clear();
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Block*> members;
    Gathering cluster_threads{0, 0, threads * cluster};
    std::vector<Thread> all(threads * cluster);
    for (int rank = 0; rank < cluster; ++rank) {
      auto block = std::make_unique<Block>();
      block->index = make_uint3(x + rank, y, 0);
      block->grid = grid;
      block->rank = rank;
      block->shared_bytes = shared_bytes > kAligned ? shared_bytes - kAligned : 0;
      block->shared = reinterpret_cast<unsigned char*>((base + 1023) / 1024 * 1024) + rank * kSharedBytes;
      block->cluster = &members;
      block->cluster_threads = &cluster_threads;
      block->threads.members = threads;
      block->warps.resize((threads + 31) / 32);
      block->exchange.resize(block->warps.size());
      for (int i = 0; i < threads; ++i) {
        ++block->warps[i / 32].members;
        Thread& thread = all[rank * threads + i];
        thread.thread = make_uint3(i, 0, 0);
        thread.block = block.get();
        thread.straggler = stragglers && random_numbers() % 16 == 0;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks.data() + (rank * threads + i) * kStackBytes;
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, body, 0);
      }
      members.push_back(block.get());
      blocks.push_back(std::move(block));
    }
    run_threads(all);
  }
}

float half_value(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
      __half_raw raw;
      raw.x = uint16_t(i);
      values[i] = __half2float(__half(raw));
    }
    return values;
  }();
  return table[bits];
}

float bfloat16_value(uint16_t bits) { return __uint_as_float(unsigned(bits) << 16); }

void drain(std::deque<std::vector<std::function<void()>>>& groups, size_t left) {
  while (groups.size() > left) {
    for (const auto& operation : groups.front()) operation();
    groups.pop_front();
  }
}

// This thread's share of the 64×n results: each of its warp's 16 rows is in four lanes.
void wgmma(float* d, uint64_t a, uint64_t b, bool accumulate, int n, bool a_transposed, bool b_transposed,
           float (*number)(uint16_t)) {
  const int lane = self->thread.x % 32, warp = self->thread.x / 32 % 4;
  float left[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      left[half][k] = number(read_bits(operand_address(a, a_transposed, warp * 16 + lane / 4 + 8 * half, k)));
  for (int column = 2 * (lane % 4), i = 0; column < n; column += 8, i += 4)
    for (int e = 0; e < 2; ++e) {
      float sums[2] = {0, 0};
      for (int k = 0; k < 16; ++k) {
        const float right = number(read_bits(operand_address(b, b_transposed, column + e, k)));
        for (int half = 0; half < 2; ++half) sums[half] += left[half][k] * right;
      }
      for (int half = 0; half < 2; ++half) d[i + 2 * half + e] = (accumulate ? d[i + 2 * half + e] : 0.0f) + sums[half];
    }
}

void count_bytes(Block* block, uint32_t barrier, int bytes) {
  Barrier& counter = find_barrier(block->shared + barrier);
  counter.bytes = counter.bytes - bytes;
  complete(counter);
}

}  // namespace emulator

using namespace emulator;

void barrier_init(uint64_t* barrier, int arrivals) {
  const uint64_t mark = kBarrierMark ^ barriers.size();
  std::memcpy(barrier, &mark, 8);
  barriers.push_back({uint16_t(arrivals), uint16_t(arrivals), 0, 0});
}

void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  Barrier& counter = find_barrier(reinterpret_cast<unsigned char*>(barrier));
  counter.bytes = counter.bytes + bytes;
  arrive(counter);
}

void barrier_arrive(uint64_t* barrier) { arrive(find_barrier(reinterpret_cast<unsigned char*>(barrier))); }

void barrier_arrive_at(uint64_t* barrier, int rank) {
  if (rank >= int(self->block->cluster->size())) fail("mapa: no such block in the cluster");
  arrive(find_barrier((*self->block->cluster)[rank]->shared + shared_address(barrier)));
}

void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const auto address = reinterpret_cast<unsigned char*>(barrier);
  wait_until("an mbarrier", [=] { return find_barrier(address).phase != parity; });
}

void tensor_load(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int sample) {
  tensor_load_multicast(target, map, barrier, column, row, sample, uint16_t(1u << self->block->rank));
}

void tensor_load_multicast(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int sample,
                           uint16_t mask) {
  const uint32_t offset = shared_address(target), counter = shared_address(barrier);
  if (offset % 128 != 0) fail("cp.async.bulk.tensor: target misaligned");
  for (size_t rank = 0; rank < self->block->cluster->size(); ++rank)
    if (mask >> rank & 1)
      bulk_copies.push_back([=, block = (*self->block->cluster)[rank], copy = *map] {
        bulk_load(block, offset, &copy, counter, column, row, sample);
      });
}

extern "C" __attribute__((visibility("default"))) void emulator_seed(unsigned seed, int slow) {
  random_numbers.seed(seed + 1);
  stragglers = slow != 0;
}
