// Memory of large outputs. The system zeroes new memory page by page, which costs as much as writing it once or twice
// (51 MB: 15 ms of two threads' 60): a block that an output has left is kept for the next one of its size. An idle
// block stays the system's to take whenever memory is short (MADV_FREE), and all of them together are bounded.
#include "cpu.h"
#include "export.h"

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <initializer_list>
#include <mutex>
#include <optional>

// Since torch 2.11; this library also runs under 2.10, where the address is null and torch's allocator serves.
extern "C" AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                          int64_t storage_offset, int32_t dtype, int32_t device_type,
                                          int32_t device_index, AtenTensorHandle* ret, int32_t layout,
                                          const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                                          void (*deleter)(void* data, void* context), void* context)
    __attribute__((weak));
#endif

namespace fastcl {
namespace {

struct Shape {
  const int64_t *sizes, *strides;
  int64_t dim;
  int32_t dtype;
  size_t bytes;
};

}  // namespace

#ifdef __linux__
namespace {

constexpr size_t kPage = 4096, kHuge = size_t(2) << 20;
constexpr size_t kGrain = 16 * kPage;      // a whole page on every machine
constexpr size_t kLarge = 2 * kHuge;       // below, malloc reuses its own
constexpr size_t kVeryLarge = 16 * kHuge;  // from here on malloc never does

struct Block {
  char* base;
  size_t bytes;
  bool held = false;  // not the system's to take while it is idle
};

class Blocks {
 public:
  Blocks() {
    pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); }, [] { all().mutex_.unlock(); });
  }

  static Blocks& all() {
    static Blocks* blocks = new Blocks;  // never deleted: tensors outlive static objects
    return *blocks;
  }

  // A block of at least so many bytes, or null.
  Block* take(size_t bytes) {
    bytes = (bytes + kPage + kGrain - 1) / kGrain * kGrain;  // a page for begin_in
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = idle_.end();
      for (auto b = idle_.begin(); b != idle_.end(); ++b)
        if ((*b)->bytes >= bytes && (*b)->bytes <= bytes + bytes / 8 &&
            (best == idle_.end() || (*b)->bytes < (*best)->bytes))
          best = b;
      if (best != idle_.end()) {
        Block* found = *best;
        remove(found);
        return found;
      }
    }
    void* base = map(bytes);
    if (base == MAP_FAILED && release() > 0) base = map(bytes);
    return base == MAP_FAILED ? nullptr : new Block{static_cast<char*>(base), bytes};
  }

  void give_back(Block* block) {
    std::vector<Block*> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      block->held = block->bytes < kVeryLarge && held_ + block->bytes <= 2 * kVeryLarge;
      if (block->held) held_ += block->bytes;
      if (!block->held) madvise(block->base, block->bytes, MADV_FREE);
      idle_.push_back(block);
      kept_ += block->bytes;
      for (size_t kept = kept_; kept > limit_; kept -= surplus.back()->bytes) surplus.push_back(idle_[surplus.size()]);
      for (Block* b : surplus) remove(b);
    }
    unmap(surplus);
  }

  size_t release() {
    std::vector<Block*> all;
    size_t bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      bytes = kept_;
      all.swap(idle_);
      kept_ = held_ = 0;
    }
    unmap(all);
    return bytes;
  }

  bool keeps() const { return limit_ > 0; }

  // Arrays of one pass that begin at one place of their pages wait for each other's stores (4 KiB aliasing).
  char* begin_in(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return block->base + 64 * (37 * ++taken_ % (kPage / 64));
  }

 private:
  void remove(Block* block) {
    idle_.erase(std::find(idle_.begin(), idle_.end(), block));
    kept_ -= block->bytes;
    if (block->held) held_ -= block->bytes;
  }

  // Begins with whole huge pages; what is left over is of small ones, so that nothing is taken that is not used.
  static void* map(size_t bytes) {
    void* all = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return all;
    char *begin = static_cast<char*>(all), *end = begin + bytes + kHuge;
    char* base = begin + (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
    if (base > begin) munmap(begin, base - begin);
    munmap(base + bytes, end - (base + bytes));
    madvise(base, bytes / kHuge * kHuge, MADV_HUGEPAGE);  // a hint: failing changes nothing
    return base;
  }

  static void unmap(const std::vector<Block*>& blocks) {
    for (Block* b : blocks) {
      munmap(b->base, b->bytes);
      delete b;
    }
  }

  static size_t limit() {
    const char* wanted = std::getenv("FASTCL_KEEP_MB");
    return (wanted ? std::strtoull(wanted, nullptr, 10) : 512) << 20;
  }

  std::mutex mutex_;
  std::vector<Block*> idle_;  // the longest idle first
  size_t kept_ = 0, held_ = 0, taken_ = 0;
  const size_t limit_ = limit();
};

// A tensor in a block, or nothing where torch's allocator should serve.
std::optional<Tensor> in_block(const Shape& shape) {
  if (torch_from_blob == nullptr || !Blocks::all().keeps()) return std::nullopt;
  Block* block = Blocks::all().take(shape.bytes);
  if (block == nullptr) return std::nullopt;
  AtenTensorHandle handle;
  const auto failed = torch_from_blob(
      Blocks::all().begin_in(block), shape.dim, shape.sizes, shape.strides, 0, shape.dtype,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { Blocks::all().give_back(static_cast<Block*>(context)); }, block);
  if (failed) {
    Blocks::all().give_back(block);
    return std::nullopt;
  }
  return Tensor(handle);
}

// torch's own memory: at least not page by page (51 MB: 9.5 ms, on huge pages 1.9).
void on_huge_pages(void* data, uintptr_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace

int64_t release_memory() { return static_cast<int64_t>(Blocks::all().release()); }
#else
int64_t release_memory() { return 0; }
#endif

namespace {

// Not torch::stable::empty_like: it looks the op up by name and goes through the dispatcher, 4 us of a tiny
// kernel's 10.
Tensor allocate(const Shape& shape) {
#ifdef __linux__
  if (shape.bytes >= kLarge)
    if (auto t = in_block(shape)) return *t;
#endif
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dim, shape.sizes, shape.strides, shape.dtype,
                                                         aoti_torch_device_type_cpu(), -1, &handle));
  const Tensor t(handle);
#ifdef __linux__
  if (shape.bytes >= kLarge) on_huge_pages(t.mutable_data_ptr(), shape.bytes);
#endif
  return t;
}

size_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 1;  // bool, bytes
  }
}

int32_t dtype_code(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

}  // namespace

Tensor fresh_like(const Tensor& like) {
  if (!like.is_cpu() || !is_dense(like)) return torch::stable::empty_like(like);
  return allocate({like.sizes().data(), like.strides().data(), like.dim(), dtype_code(like.scalar_type()),
                   static_cast<size_t>(like.numel()) * like.element_size()});
}

Tensor fresh(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[4], stride = 1, numel = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes.begin()[d], 1)) {
    strides[d] = stride;
    numel *= sizes.begin()[d];
  }
  return allocate({sizes.begin(), strides, static_cast<int64_t>(sizes.size()), dtype_code(dtype),
                   static_cast<size_t>(numel) * size_of(dtype)});
}

}  // namespace fastcl

extern "C" FASTCL_EXPORT int64_t fastcl_release_memory() { return fastcl::release_memory(); }
